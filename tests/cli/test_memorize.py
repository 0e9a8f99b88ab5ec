"""`weftrain memorize` and `weftrain generate` on a tiny run's folder: tables, files, tokenizers, and what is
refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.evaluation.tokenizer import open_tokenizer
from weftrain.cli.generate import generate
from weftrain.cli.memorize import memorize
from weftrain.cli.opened_model import default_tokenizer
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import CheckpointError, DataError
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe

SMALL = ("--k", "5", "--l", "6", "--samples", "5")


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)  # so small a model gains nothing from a second


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("crystal", "schedule.steps=6")


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 2 and 4; the weights are random, another draw each."""
    folder = tmp_path / "runs" / "tiny"
    for step in (2, 4):
        tensors = {f"weights/{spec.name}": draw(spec, recipe.model, step) for spec in parameter_specs(recipe.model)}
        claims: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "dataset_id": "d",
            "fingerprint": {},
            "kernels": {},
        }
        state = State(step, step, {**tensors, "exp_avg/x": tensors["weights/embedding.weight"]})
        checkpoint.save(folder / "checkpoints", state, tokens=0, position=step * 4, parent=None, **claims)
    return folder


def invoke(command: Any, *arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)


def generator_of(recipe: Recipe, step: int) -> Generator:
    return Generator(
        load_model({spec.name: draw(spec, recipe.model, step) for spec in parameter_specs(recipe.model)}, recipe.model)
    )


def test_every_chunk_at_every_checkpoint(run: Path, recipe: Recipe) -> None:
    done = invoke(memorize, run, *SMALL)
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.startswith("steps_")}
    assert list(lines) == ["steps_00000000_00000002", "steps_00000002_00000004", "steps_00000004_00000006"]
    place = run / "analyses" / "memorization" / "k5_l6_samples5_seed0"
    summary = json.loads((place / "summary.json").read_bytes())
    assert [cell["relation"] for cell in summary["matrix"]] == [
        "just seen",
        "unseen",
        "unseen",
        "earlier",
        "just seen",
        "unseen",
    ]
    assert len(list(place.glob("*.png"))) == 5
    source = training_source(recipe)
    for step in (2, 4):
        stored = json.loads((place / f"step_{step:08d}" / "steps_00000002_00000004.json").read_bytes())
        assert len(stored["sample_numbers"]) == 5
        rows = [source.rows(number // 4, number % 4, 1).ids[0].tolist() for number in stored["sample_numbers"]]
        decoded = generator_of(recipe, step).generate([row[:5] for row in rows], 6)
        expected = [
            sum(a == b for a, b in zip(row[5:11], new, strict=True)) for row, new in zip(rows, decoded, strict=True)
        ]
        assert stored["matches"] == expected
        percent = 100 * expected.count(6) / 5
        assert f"{percent:.2f} / {sum(expected) / 30:.4f}" in lines["steps_00000002_00000004"]


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("it measured first")

    monkeypatch.setattr("weftrain.analysis.memorization.scores.measure", measured)
    # root, for one, may write everywhere
    monkeypatch.setattr("weftrain.cli.memorize.os.access", lambda place, mode, **_: mode != os.W_OK)
    refused = invoke(memorize, run, *SMALL, "--to", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert "may not be written: name another folder" in " ".join(refused.output.split())
    (tmp_path / "file").write_text("")
    refused = invoke(memorize, run, *SMALL, "--to", tmp_path / "file")
    assert isinstance(refused.exception, OSError)  # which the command line tells in one line


def test_checkpoints_by_number_by_folder_and_elsewhere(run: Path, tmp_path: Path) -> None:
    done = invoke(memorize, run, *SMALL, "--checkpoints", "4", "--to", tmp_path / "out", "--no-plots")
    assert done.exit_code == 0, done.output
    assert "step 2" not in done.output
    place = tmp_path / "out" / "k5_l6_samples5_seed0"
    assert sorted(path.name for path in place.iterdir()) == ["step_00000004", "summary.json"]
    whole = {path.name: path.read_bytes() for path in (place / "step_00000004").iterdir()}
    done = invoke(memorize, run / "checkpoints" / "step_00000004", *SMALL, "--no-plots")
    assert done.exit_code == 0, done.output
    found = run / "analyses" / "memorization" / "k5_l6_samples5_seed0" / "step_00000004"
    assert {path.name: path.read_bytes() for path in found.iterdir()} == whole


def test_a_released_sample(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "chunk 7.jsonl"
    path.write_text(
        "".join(json.dumps({"source": "s", "prompt": [i, 2], "continuation": [3, 4, 5]}) + "\n" for i in range(9))
    )
    done = invoke(memorize, run, "--k", 2, "--l", 3, "--sample", path, "--no-plots")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("sample_chunk_7")]
    assert line.count("?") == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--k", "9", "--l", "6"), DataError, "15 tokens, a row of training has 14"),
        (("--k", "9", "--l", "8"), DataError, "17 tokens, the model has 16 positions"),
        ((*SMALL, "--checkpoints", "3"), CheckpointError, "no checkpoint of step 3; there are 2, 4"),
    ],
)
def test_refused_before_a_checkpoint_is_read(
    run: Path, options: tuple[str, ...], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
    done = invoke(memorize, run, *options)
    assert isinstance(done.exception, error)
    assert message in str(done.exception)


def test_folders_without_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    assert "neither 'all' nor steps" in invoke(memorize, run, "--checkpoints", "x").output
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for command, options in ((memorize, ()), (generate, ("--ids", "1"))):
        assert "does not exist" in invoke(command, tmp_path / "nowhere", *options).output
        for folder in (tmp_path / "empty", run / "checkpoints"):
            assert isinstance(invoke(command, folder, *options).exception, CheckpointError), folder


# generate


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[[int], Path]:
    """A word-level tokenizer.json of so many ids: w0, w1, ..."""

    def make(size: int) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers

        built = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
        built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        built.save(str(tmp_path / f"tokenizer_{size}.json"))
        return tmp_path / f"tokenizer_{size}.json"

    return make


def test_generate_ids_and_text(run: Path, recipe: Recipe, tokenizer: Callable[[int], Path]) -> None:
    (expected,) = generator_of(recipe, 4).generate([[5, 6, 7]], 8)
    done = invoke(generate, run, "--ids", "5, 6,7", "--max-new-tokens", 8)
    assert done.output == ",".join(map(str, expected)) + "\n"
    done = invoke(generate, run, "--prompt", "w5 w6 w7", "--max-new-tokens", 8, "--tokenizer", tokenizer(97))
    assert done.output == " ".join(f"w{index}" for index in [5, 6, 7, *expected]) + "\n"
    (older,) = generator_of(recipe, 2).generate([[5, 6, 7]], 8, temperature=2.0, top_k=50, top_p=0.9, seed=7)
    sampling = ("--temperature", 2, "--top-k", 50, "--top-p", 0.9, "--seed", 7)
    done = invoke(generate, run / "checkpoints" / "step_00000002", "--ids", "5,6,7", "--max-new-tokens", 8, *sampling)
    assert done.output == ",".join(map(str, older)) + "\n"
    done = invoke(generate, run, "--ids", "5,6,7", "--max-new-tokens", 8, "--stop-id", expected[3])
    assert done.output == ",".join(map(str, expected[: expected.index(expected[3])])) + "\n"


def test_a_tokenizer_must_fit_the_model(run: Path, tokenizer: Callable[[int], Path], tmp_path: Path) -> None:
    done = invoke(generate, run, "--prompt", "w5", "--tokenizer", tokenizer(98))
    assert isinstance(done.exception, DataError)
    assert "its largest id 97 is outside the model's vocabulary of 97" in str(done.exception)
    done = invoke(generate, run, "--prompt", "w5")
    assert "random rows have no tokenizer" in str(done.exception)
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (("bad.json", "not a tokenizer.json"), ("none.json", "cannot read the tokenizer")):
        with pytest.raises(DataError, match=message):
            open_tokenizer(tmp_path / name, 97)
    chosen = load_recipe("crystal_demo", ["data.root=/somewhere"]).recipe
    assert default_tokenizer(chosen) == Path("/somewhere/python_stdlib/tokenizer.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of --prompt and --ids"),
        (("--ids", "1", "--prompt", "x"), "one of --prompt and --ids"),
        (("--ids", "1,x"), "'1,x' is not a list of ids"),
        (("--ids", "1", "--top-k", "3"), "need a --temperature above 0"),
        (("--ids", "1", "--top-p", "1.5"), "--top-p"),
    ],
)
def test_options_that_make_no_sense(run: Path, options: tuple[str, ...], message: str) -> None:
    done = invoke(generate, run, *options)
    assert done.exit_code == 2
    assert message in done.output


def test_ids_and_lengths_beyond_the_model(run: Path) -> None:
    assert "id 97 is outside the model's vocabulary of 97" in str(invoke(generate, run, "--ids", "97").exception)
    assert "need 17 positions, the model has 16" in str(
        invoke(generate, run, "--ids", "1", "--max-new-tokens", 16).exception
    )
