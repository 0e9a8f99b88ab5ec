"""Weights of loss from records to shards: of texts with `--weight-key`, of answers in conversations; and a run on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from click.testing import Result
from made_texts import sentences

from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import open_set
from weftrain.data_prep.tokens.tokenization import load_encoder
from weftrain.data_prep.tokens.training import train_encoder

Run = Callable[..., Result]
# of texts: those that are no float32, that mask, and that change nothing
WEIGHTS = [0.1, 1.0, 2.5, 0.0, 1e6, 0.3333333, 1, None]


@pytest.fixture
def weftrain(weftrain: Run, tmp_path: Path) -> Run:
    """With a tokenizer in tmp_path."""
    (tmp_path / "tokenizer.json").write_bytes(train_encoder([*sentences(60), "user assistant\n"], 300).data)
    return weftrain


def prep(weftrain: Run, folder: Path, inputs: Path, name: str, *options: str | Path) -> Result:
    words = [inputs, "--name", name, "--output", folder, "--tokenizer", folder / "tokenizer.json"]
    return weftrain("prep", *words, "--sequence-length", "32", "--heldout-fraction", "0", *options)


def write_texts(
    folder: Path, texts: list[str], kinds: tuple[str, ...] = ("jsonl", "json", "parquet")
) -> dict[str, float]:
    """Texts with weights in files of each kind, below `folder`; the weight of each text as float32."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    records = [{"text": text, "about": {"w": WEIGHTS[place % len(WEIGHTS)]}} for place, text in enumerate(texts)]
    for number, kind in enumerate(kinds):
        own = records[number :: len(kinds)]
        if kind == "jsonl":
            (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
        elif kind == "json":
            (folder / "b.json").write_text(json.dumps(own))
        else:
            parquet.write_table(pyarrow.Table.from_pylist(own), folder / "c.parquet")
    values = [record["about"]["w"] for record in records]  # type: ignore[index]
    return {text: 1.0 if value is None else float(np.float32(value)) for text, value in zip(texts, values, strict=True)}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_token_of_a_text_has_its_weight(packing: str, weftrain: Run, tmp_path: Path) -> None:
    """By a reader of its own, over shards of a few rows, which cut documents."""
    weights = write_texts(tmp_path / "in", sentences(90))
    options = ["--weight-key", "about.w", "--packing", packing, "--rows-per-shard", "7"]
    result = prep(weftrain, tmp_path, tmp_path / "in", "weighted", *options)
    assert result.exit_code == 0, result.output
    folder, encoder = tmp_path / "weighted", load_encoder(tmp_path / "tokenizer.json")
    manifest = read_dataset_manifest(folder)
    of_weight = sum(weight not in (0, 1) for weight in weights.values())
    assert (manifest.version, manifest.tokenization.weighted_documents) == (4, of_weight)
    assert f"{of_weight} documents with a weight of loss" in result.output
    found = independent_reader.documents(folder, "train")
    assert len(found) > 80
    for document in found[:-1]:  # the last may have lost its end
        text = encoder.decode(document.tokens).removesuffix("</s>")
        assert document.weights.tolist() == [weights[text]] * len(document.tokens), text
        assert document.mask.tolist() == [int(weights[text] > 0)] * len(document.tokens)
    for verb in ("verify", "stats"):
        shown = weftrain("data", verb, folder)
        assert shown.exit_code == 0, shown.output
    assert f"weights      {of_weight} documents have a weight of loss other than 0 and 1" in shown.output
    for form in ("cerebras", "megatron"):
        refused = weftrain("data", "export", form, folder, tmp_path / "out")
        assert "holds weights of tokens, for which neither format has a place" in refused.output


def test_the_same_bytes_from_any_number_of_processes_and_none_more_without_weights(
    weftrain: Run, tmp_path: Path
) -> None:
    write_texts(tmp_path / "in", sentences(60), ("jsonl",))
    for name, *options in (
        ("one", "--weight-key", "about.w"),
        ("two", "--weight-key", "about.w", "--workers", "2"),
        ("without",),
    ):
        assert prep(weftrain, tmp_path, tmp_path / "in", name, *options).exit_code == 0
    shards = {name: (tmp_path / name / "train" / "00000.h5").read_bytes() for name in ("one", "two", "without")}
    assert shards["one"] == shards["two"]
    ones = [json.loads(line) | {"about": {"w": 1}} for line in (tmp_path / "in" / "a.jsonl").read_text().splitlines()]
    (tmp_path / "ones.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ones))
    assert prep(weftrain, tmp_path, tmp_path / "ones.jsonl", "ones", "--weight-key", "about.w").exit_code == 0
    manifests = [read_dataset_manifest(tmp_path / name) for name in ("ones", "without")]
    assert [manifest.version for manifest in manifests] == [3, 3]
    assert {"token_weights", "loss_mask"}.isdisjoint(open_set(tmp_path / "ones", "train")[1].reader(0).planes)
    # where all is counted under one source, weights of 1 leave every byte of the shards as it was
    of_source = [manifest.train.shards[0].num_bytes for manifest in manifests]
    assert of_source[0] == of_source[1]


def test_a_weight_that_is_none_is_a_failure_with_file_and_line(weftrain: Run, tmp_path: Path) -> None:
    bad = {
        '"2"': "'w' holds str, not a number",
        "-1": "'w' is -1: a weight is 0, or from 0.000001 to 1,000,000",
        "NaN": "'w' is nan: a weight is 0",
        "1e300": "'w' is 1e+300: a weight is 0",
        "true": "'w' holds bool, not a number",
    }
    lines = [json.dumps({"text": text, "w": 2}) for text in sentences(9)]
    lines[3:3] = [*(f'{{"text": "a", "w": {weight}}}' for weight in bad), '{"text": "a"}']
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    refused = prep(weftrain, tmp_path, path, "x", "--weight-key", "w")
    assert refused.exit_code == 2
    reasons = [*bad.values(), "no field 'w': give the text a weight, or name its field with --weight-key"]
    for number, why in enumerate(reasons, start=4):
        assert f"in.jsonl:{number}: {why}" in refused.output
    allowed = prep(weftrain, tmp_path, path, "x", "--weight-key", "w", "--max-failures", "6")
    assert allowed.exit_code == 0, allowed.output
    assert read_dataset_manifest(tmp_path / "x").documents.failed == 6


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--fim-rate", "0.5"], "--weight-key: fill-in-the-middle does not keep weights"),
        (["--chat-template", "chatml"], "--weight-key: is of texts: an answer of a conversation has its weight in its"),
        (["--format", "text"], "weights are read from arrow, json, jsonl, parquet, not from text: convert them"),
    ],
)
def test_what_has_no_weight_of_a_text_is_refused(options: list[str], why: str, weftrain: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "w": 1}\n')
    refused = prep(weftrain, tmp_path, path, "x", "--weight-key", "w", *options)
    assert refused.exit_code == 2
    assert why in refused.output


def test_a_column_of_weights_must_hold_numbers(weftrain: Run, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "w": ["1"]}), tmp_path / "a.parquet")
    refused = prep(weftrain, tmp_path, tmp_path / "a.parquet", "x", "--weight-key", "w")
    assert "a.parquet: column 'w' holds string, not numbers; name another with --weight-key" in refused.output


def talk(number: int, *weights: float) -> dict[str, object]:
    said: list[dict[str, object]] = []
    for turn, weight in enumerate(weights):
        said.append({"role": "user", "content": f"ask {number} {turn}"})
        said.append({"role": "assistant", "content": f"say {number} {turn}", "weight": weight})
    return {"messages": said}


def write_talks(path: Path, talks: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in talks))
    return path


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_every_token_of_an_answer_has_its_weight(packing: str, weftrain: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    # each has something to learn
    of_talks = [[*random.choice([0, 0.5, 1, 2.25], number % 4).tolist(), 2.25] for number in range(40)]
    path = write_talks(tmp_path / "talks.jsonl", [talk(number, *weights) for number, weights in enumerate(of_talks)])
    options = ["--chat-template", "chatml", "--packing", packing, "--sequence-length", "192", "--rows-per-shard", "3"]
    result = prep(weftrain, tmp_path, path, "talks", *options)
    assert result.exit_code == 0, result.output
    encoder = load_encoder(tmp_path / "tokenizer.json")
    found = independent_reader.documents(tmp_path / "talks", "train")
    assert len(found) > 35
    for document in found[: -1 if packing == "concatenate" else None]:
        assert document.weights[document.mask == 0].max(initial=0) == 0
        bears = np.flatnonzero(document.mask)
        cuts = np.flatnonzero((np.diff(bears) > 1) | (np.diff(document.weights[bears]) != 0)) + 1
        runs = [(document.weights[run[0]], encoder.decode(document.tokens[run])) for run in np.split(bears, cuts)]
        wanted = [
            (weight, f"say {document.record} {turn}<|im_end|>")
            for turn, weight in enumerate(of_talks[document.record])
            if weight
        ]
        assert runs == wanted


def test_head_shows_weights_and_a_grown_dataset_keeps_them(weftrain: Run, tmp_path: Path) -> None:
    plain = write_talks(tmp_path / "plain.jsonl", [talk(number, 1) for number in range(4)])
    more = write_talks(tmp_path / "more.jsonl", [talk(9, 1, 0, 0.5), talk(1, 1)])
    chat = ["--chat-template", "chatml", "--sequence-length", "128"]
    assert prep(weftrain, tmp_path, plain, "plain", *chat).exit_code == 0
    grown = weftrain("prep", more, "--name", "grown", "--output", tmp_path, "--grow", tmp_path / "plain")
    assert grown.exit_code == 0, grown.output
    manifest, shards = open_set(tmp_path / "grown", "train")
    assert (manifest.version, manifest.tokenization.weighted_documents, manifest.documents.duplicates) == (4, 1, 1)
    assert read_dataset_manifest(tmp_path / "plain").version == 3
    assert [reader.planes for reader in shards.readers()] == [("loss_mask",), ("loss_mask", "token_weights")]
    shown = weftrain("data", "head", tmp_path / "grown", "--from", str(shards.num_rows - 1), "--rows", "1").output
    assert "    > say 9 0<|im_end|>\n" in shown
    assert "    | say 9 1<|im_end|>\n" in shown or "    | say 9 1" in shown
    assert "    0.5 > say 9 2<|im_end|>\n" in shown


@pytest.mark.prove
def test_a_run_on_weights_is_resumed_released_verified_and_replayed(
    weftrain: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    write_texts(tmp_path / "in", sentences(200), ("jsonl",))
    assert prep(weftrain, tmp_path, tmp_path / "in", "weighted", "--weight-key", "about.w").exit_code == 0
    sources = json.dumps([{"name": "a", "path": "weighted", "weight": 1.0}])
    data = ["data.synthetic_rows=null", f"data.root={tmp_path}", f"data.sources={sources}", "data.sequence_length=32"]
    data += ["model.vocab_size=332", "model.max_position_embeddings=32", "backend.name=local"]
    kept = [item for item in tiny_overrides if not item.startswith(("data.s", "model.vocab", "model.max_pos"))]
    steps = ["checkpoint.every_steps=2", "schedule.steps=4"]
    words = ["train", "crystal_demo", *kept, *data, *steps, "--runs", tmp_path / "runs"]
    refused = weftrain(*words, "--run", "silent")
    assert refused.exit_code == 2
    assert "weighted: holds weights of tokens, and the recipe does not say whether they count: set" in refused.output
    losses = {}
    for told in ("true", "false"):
        done = weftrain(*words, f"objective.token_weights={told}", "--run", told)
        assert done.exit_code == 0, done.output
        lines = map(json.loads, (tmp_path / "runs" / told / "metrics.jsonl").read_text().splitlines())
        losses[told] = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses["true"][0] != losses["false"][0]
    released = weftrain("release", tmp_path / "runs" / "true", "--to", tmp_path / "release", "--licence", "MIT")
    assert released.exit_code == 0, released.output
    for verb in ("verify", "replay"):
        checked = weftrain(verb, tmp_path / "release")
        assert checked.exit_code == 0, checked.output
