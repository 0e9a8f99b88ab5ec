"""eval, memorize and generate straight from the folder of a Hugging Face model, and of a series of its revisions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from weftrain.analysis.compare.huggingface import load_own
from weftrain.analysis.evaluation.generation import Generator
from weftrain.analysis.evaluation.heldout import RaggedRows, held_out_loss
from weftrain.core.model import Decoder
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.huggingface.folder import write_huggingface

Weftrain = Callable[..., Result]
SMALL = ["model.vocab_size=97", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2"]
SMALL += [
    "model.intermediate_size=48",
    "model.rotary_dim=16",
    "model.max_position_embeddings=32",
    "data.sequence_length=16",
]
ROWS = [list(range(1, 9)), [5, 4, 3], [96, 0, 96, 0, 7]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two wait for each other where the machine is busy


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Revisions of steps 1000 and 2000 with a tokenizer whose word w7 is id 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = load_recipe("amber_demo", SMALL).recipe.model
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    series = tmp_path_factory.mktemp("series")
    for step in (1000, 2000):
        generator = torch.Generator().manual_seed(step)
        weights = {spec.name: 0.4 * torch.randn(spec.shape, generator=generator) for spec in parameter_specs(config)}
        beside = {"tokenizer.json": tokenizer.to_str().encode()}
        write_huggingface(series / f"step{step}", weights, config, torch.float32, beside=beside)
    return series


@pytest.fixture
def series(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "series"))


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def model_of(series: Path, step: int) -> Decoder:
    return load_own(series / f"step{step}")


def test_the_loss_of_each_revision_is_recorded(weftrain: Weftrain, series: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    printed = done(weftrain("eval", series, "--loss-on", ids, "--device", "cpu", "--json"))
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [(record["step"], record["tokens"], record["samples"]) for record in records] == [
        (1000, 13, 3),
        (2000, 13, 3),
    ]
    for record in records:
        expected = held_out_loss(model_of(series, record["step"]), RaggedRows("ids", ROWS), 16)
        assert record["value"] == expected.loss
        (path,) = (series / f"step{record['step']}" / "analyses" / "evaluations").glob("*.json")
        assert json.loads(path.read_bytes())["value"] == record["value"]
    assert records[0]["value"] != records[1]["value"]
    one = weftrain("eval", series / "step2000", "--loss-on", ids, "--device", "cpu", "--json", "--rows", "2")
    assert json.loads(done(one).splitlines()[-1])["tokens"] == 9


def test_memorization_of_each_revision(weftrain: Weftrain, series: Path, tmp_path: Path) -> None:
    prompts = np.random.default_rng(0).integers(0, 97, (4, 6)).tolist()
    recited = Generator(model_of(series, 2000)).generate(prompts, 5)
    sample = tmp_path / "sample.jsonl"
    rows = [{"source": "s", "prompt": prompts[index], "continuation": recited[index]} for index in range(4)]
    rows[0]["continuation"] = [(token + 1) % 97 for token in recited[0]]
    sample.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = ["--k", "6", "--l", "5", "--sample", sample, "--no-plots"]
    done(weftrain("memorize", series, *lengths))
    found = series / "analyses" / "memorization" / "k6_l5_samples1000_seed0"
    matches = {}
    for step in (1000, 2000):
        value = json.loads((found / f"step_{step:08d}" / "sample_sample.json").read_bytes())
        decoded = np.array(Generator(model_of(series, step)).generate(prompts, 5))
        expected = (decoded == np.array([row["continuation"] for row in rows])).sum(axis=1).tolist()
        matches[step] = value["matches"]
        assert value["matches"] == expected
    assert matches[2000] == [0, 5, 5, 5]
    done(weftrain("memorize", series / "step2000", *lengths, "--to", tmp_path / "one"))
    assert [path.name for path in tmp_path.glob("one/*/step_*")] == ["step_00002000"]
    done(weftrain("memorize", series, *lengths, "--checkpoints", "1000", "--to", tmp_path / "first"))
    assert [path.name for path in tmp_path.glob("first/*/step_*")] == ["step_00001000"]


def test_generate_with_ids_and_with_the_folders_tokenizer(weftrain: Weftrain, series: Path) -> None:
    (expected,) = Generator(model_of(series, 1000)).generate([[5, 6, 7]], 8)
    printed = done(weftrain("generate", series / "step1000", "--ids", "5,6,7", "--max-new-tokens", "8"))
    assert printed.strip() == ",".join(map(str, expected))
    printed = done(weftrain("generate", series / "step1000", "--prompt", "w5 w6 w7", "--max-new-tokens", "8"))
    assert printed.split() == [f"w{token}" for token in [5, 6, 7, *expected]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "SERIES"], "names no held-out set: give --loss-on, --tasks, --preset or --code"),
        (["eval", "SERIES/step1000"], "names no held-out set"),
        (["eval", "SERIES", "--loss-on", "SERIES/long.jsonl"], "32 positions do not hold rows of 40 tokens"),
        (["eval", "SERIES", "--loss-on", "SERIES/large.jsonl"], "vocabulary of 97 ids does not hold id 97"),
        (
            ["eval", "SERIES/step1000", "data.root=x", "--loss-on", "SERIES/large.jsonl"],
            "has no recipe for 'data.root=x'",
        ),
        (["memorize", "SERIES"], "does not say its training data: give --sample FILE"),
        (
            ["memorize", "SERIES", "--sample", "SERIES/rows.jsonl", "--k", "32", "--l", "1"],
            "the model has 32 positions",
        ),
        (["memorize", "SERIES", "--sample", "SERIES/rows.jsonl", "--checkpoints", "7"], "there are 1000, 2000"),
        (["generate", "SERIES/step1000", "model.vocab_size=3", "--ids", "1"], "has no recipe for 'model.vocab_size=3'"),
        (["generate", "SERIES/step1000", "--ids", "97"], "id 97 is outside the model's vocabulary of 97"),
    ],
)
def test_what_is_refused(weftrain: Weftrain, series: Path, arguments: list[str], said: str) -> None:
    for name, row in (("long", [1] * 41), ("large", [1, 97])):
        (series / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    row: dict[str, Any] = {"source": "s", "prompt": [1] * 32, "continuation": [2]}
    (series / "rows.jsonl").write_text(json.dumps(row) + "\n")
    if "7" in arguments:
        arguments = [*arguments, "--k", "32", "--l", "1"]
    result = weftrain(*(word.replace("SERIES", str(series)) for word in arguments))
    assert (result.exit_code, said in " ".join(result.output.split())) == (2, True), result.output


def test_another_architecture_is_recited_by_transformers_and_refused_elsewhere(
    weftrain: Weftrain, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    settings = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    prompt = [1, 2, 3]
    with torch.no_grad():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"source": "s", "prompt": prompt, "continuation": [first]}))
    lengths = ["--k", "3", "--l", "1", "--sample", tmp_path / "rows.jsonl", "--no-plots"]
    assert "100.00 / 1.0000" in done(weftrain("memorize", tmp_path / "gpt2", *lengths))
    for verb in (["generate", tmp_path / "gpt2", "--ids", "1"], ["eval", tmp_path / "gpt2", "--tasks", "x"]):
        refused = weftrain(*verb)
        assert (refused.exit_code, "model_type 'gpt2' is not one that converts" in refused.output) == (2, True)
