"""`weftrain prep --preferences`: pairs in, rows of two sides out, each failure counted by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.data_prep.tokens.tokenization import load_encoder
from weftrain.data_prep.tokens.training import train_encoder

Prep = Callable[..., Result]
T = 48


def preference(number: int, other: str = "no idea") -> dict[str, object]:
    return {"prompt": f"What is {number} + 1?", "chosen": f"It is {number + 1}.", "rejected": f"I have {other}."}


@pytest.fixture
def prep(tmp_path: Path) -> Prep:
    """Runs the verb on records, in rows of two sides of T tokens, or as `options` say."""
    (tmp_path / "tokenizer.json").write_bytes(train_encoder([json.dumps(preference(1))] * 3, 300).data)

    def run(records: list[object], *options: str, name: str = "pairs") -> Result:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        words = [path, "--name", name, "--output", tmp_path, "--tokenizer", tmp_path / "tokenizer.json"]
        words += ["--sequence-length", T, "--heldout-fraction", 0, "--workers", 1]
        words += ["--preferences", "pairs"] if "--preferences" not in options else []
        return CliRunner().invoke(main, ["prep", *map(str, words), *options])

    return run


def test_a_row_is_a_pair_and_its_answers_bear_loss(prep: Prep, tmp_path: Path) -> None:
    result = prep([preference(number) for number in range(9)], "--chat-template", "chatml")
    assert result.exit_code == 0, result.output
    manifest, shards = open_set(tmp_path / "pairs", "train")
    assert (manifest.pairs, manifest.packing, manifest.sequence_length, shards.num_rows) == (True, "rows", 2 * T, 9)
    encoder, seen = load_encoder(tmp_path / "pairs" / "tokenizer.json"), set()
    for row in range(shards.num_rows):
        ids, mask = shards.rows(np.array([row]))
        assert mask is not None
        bears = mask[0]
        assert not bears[T - 1]  # the rejected side's first token, as the chosen side's last label
        learnt = [encoder.decode(ids[0, 1:][side][bears[side]]) for side in (slice(0, T), slice(T, 2 * T))]
        number = int(learnt[0].removeprefix("It is ").removesuffix(".<|im_end|>")) - 1
        assert learnt[1] == "I have no idea.<|im_end|>"
        assert encoder.decode(ids[0, :T]).count(f"What is {number} + 1?") == 1
        assert encoder.decode(ids[0, T:]).count(f"What is {number} + 1?") == 1
        seen.add(number)
    assert seen == set(range(9))
    shown = CliRunner().invoke(main, ["data", "head", str(tmp_path / "pairs"), "--rows", "1"]).output
    assert "  chosen    inputs 0.." in shown
    assert f"  rejected  inputs {T}.." in shown
    assert "    > I have no idea.<|im_end|>" in shown


def test_failures_are_counted_by_name_and_undecided_records_are_left_out(prep: Prep, tmp_path: Path) -> None:
    safe = {"prompt": "a", "response_0": "b", "response_1": "c", "is_response_0_safe": True}
    records: list[object] = [
        preference(1),
        preference(2) | {"rejected": preference(2)["chosen"]},
        preference(3) | {"chosen": ""},
        preference(4, "no idea, " + "and so on, " * 20),
        preference(5) | {"prompt": "and so on, " * 20},
        safe | {"is_response_1_safe": True},
        safe | {"is_response_1_safe": False},
    ]
    refused = prep(records)
    assert refused.exit_code == 2
    assert "pairs.jsonl:2: has identical answers" in refused.output
    assert "pairs.jsonl:3: has no chosen answer" in refused.output
    made = prep(records, "--max-failures", "2", name="cut")
    assert made.exit_code == 0, made.output
    assert "1 preference whose prompt was cut to its end" in made.output
    assert "1 preference whose answers were cut at their ends" in made.output
    assert "1 record whose answers are equally good" in made.output
    manifest = read_dataset_manifest(tmp_path / "cut")
    counts = manifest.tokenization
    assert (counts.cut_prompts, counts.cut_answers, counts.no_preference) == (1, 1, 1)
    assert (manifest.documents.train, manifest.documents.failed) == (4, 2)
    dropped = prep(records, "--max-failures", "4", "--too-long", "drop", name="dropped")
    assert dropped.exit_code == 0, dropped.output
    assert read_dataset_manifest(tmp_path / "dropped").documents.failed == 4


def test_parquet_has_the_same_pairs_and_they_are_duplicates(prep: Prep, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(preference(1)) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist([preference(1), preference(2)]), folder / "b.parquet")
    prep([preference(1)], name="unused")
    words = [folder, "--name", "all", "--output", tmp_path, "--tokenizer", tmp_path / "tokenizer.json"]
    words += ["--preferences", "pairs", "--sequence-length", T, "--heldout-fraction", 0, "--workers", 1]
    result = CliRunner().invoke(main, ["prep", *map(str, words)])
    assert result.exit_code == 0, result.output
    documents = read_dataset_manifest(tmp_path / "all").documents
    assert (documents.read, documents.duplicates, documents.train) == (3, 1, 2)


def test_all_pairs_of_a_prompt_are_held_out_together(prep: Prep, tmp_path: Path) -> None:
    records: list[object] = [preference(number, f"{other}") for number in range(20) for other in range(4)]
    made = prep(records, "--heldout-fraction", "0.3")
    assert made.exit_code == 0, made.output
    manifest = read_dataset_manifest(tmp_path / "pairs")
    assert manifest.heldout is not None
    assert 4 <= manifest.documents.heldout <= 40
    prompts = {}
    for name in manifest.sets:
        ids, _ = ShardSet(tmp_path / "pairs", manifest, name).rows(np.arange(manifest.sets[name].n_examples))
        encoder = load_encoder(tmp_path / "pairs" / "tokenizer.json")
        prompts[name] = {encoder.decode(row[:T]).split("?")[0] for row in ids}
    assert prompts["train"].isdisjoint(prompts["heldout"])


def test_again_it_is_up_to_date_grows_and_refuses_other_settings(prep: Prep, tmp_path: Path) -> None:
    records: list[object] = [preference(number) for number in range(6)]
    assert "is ready" in prep(records).output
    assert "is up to date" in prep(records).output
    assert "was prepared with max_prompt 24, not 20" in prep(records, "--max-prompt", "20").output
    assert "was prepared with" in prep(records, "--preferences", "chosen").output
    (tmp_path / "more.jsonl").write_text(json.dumps(preference(9)) + "\n" + json.dumps(preference(3)) + "\n")
    words = [
        tmp_path / "more.jsonl",
        "--name",
        "grown",
        "--output",
        tmp_path,
        "--grow",
        tmp_path / "pairs",
        "--workers",
        1,
    ]
    grown = CliRunner().invoke(main, ["prep", *map(str, words)])
    assert grown.exit_code == 0, grown.output
    manifest = read_dataset_manifest(tmp_path / "grown")
    assert (manifest.documents.train, manifest.pairs, manifest.sequence_length) == (7, True, 2 * T)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--packing", "best_fit"], "leave --packing out"),
        (["--fim-rate", "0.5"], "fill-in-the-middle would cut preferences"),
        (["--too-long", "split"], "none is split"),
        (["--max-prompt", str(T)], f"--max-prompt {T}: leaves no token of {T} to an answer"),
        (["--chat-template", "chatml", "--turn-end", "<end>"], "--turn-end <end>: is no control token"),
    ],
)
def test_what_does_not_go_with_preferences_is_refused(prep: Prep, options: list[str], why: str) -> None:
    result = prep([preference(1)], *options)
    assert result.exit_code == 2
    assert why in result.output


def test_a_pair_is_read_as_two_rows_only(prep: Prep, tmp_path: Path) -> None:
    assert prep([preference(number) for number in range(6)]).exit_code == 0
    words = [
        "train",
        "amber_demo",
        f"data.root={tmp_path}",
        "data.sources.0.path=pairs",
        f"data.sequence_length={2 * T}",
    ]
    result = CliRunner().invoke(main, [*words, "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert f"set data.sequence_length={T} data.row_length={2 * T}" in result.output
