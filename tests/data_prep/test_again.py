"""A dataset is prepared again from its inputs: the same bytes, or the file and the row where they part."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest, write_dataset_manifest
from weftrain.core.formats.dataset_manifest import FimSettings, merkle_root
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.formats.shard_reader import ShardReader
from weftrain.data_prep.again import Sample, check_inputs_again
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.listing import Wanted, find_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.executors import LocalExecutor
from weftrain.data_prep.stages.settings import Inputs

WORDS = ("again", "thread", "loom", "carried", "across", "weave", "shuttle", "pattern", "bobbin", "selvedge")


def texts(folder: Path, seed: int = 3) -> Path:
    """Two files of JSON lines with a field `body`, 20 texts each."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        rows = [{"body": f"{name}{number} " + " ".join(draw.choices(WORDS, k=30))} for number in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made(inputs: Path, output: Path, **more: Any) -> Path:
    """A dataset of small shards."""
    listed = find_inputs([Wanted((str(inputs),), keys=("body",))])
    options = ReadOptions(text_key="body", sequence_length=16)
    settings = {
        "vocab_size": 300,
        "sequence_length": 16,
        "heldout_fraction": 0.2,
        "rows_per_shard": 20,
        "executor": LocalExecutor(1),
    } | more
    found = prepare(Inputs(listed.files, "texts", options=options), output, name="it", **settings)
    assert found is not None
    return found.folder


def again(folder: Path, *inputs: Path, sample: Sample | None = None, **reading: str) -> Any:
    told = {"text_key": "body"} | reading
    return check_inputs_again(folder, list(map(str, inputs)), told, LocalExecutor(1), sample=sample)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    made(texts(home / "texts"), home / "datasets")
    return home


@pytest.fixture
def inputs(home: Path, tmp_path: Path) -> Path:
    """A copy of the inputs that a test may edit."""
    return Path(shutil.copytree(home / "texts", tmp_path / "texts"))


def test_the_same_inputs_elsewhere_are_the_same_bytes(home: Path, inputs: Path) -> None:
    found = again(home / "datasets" / "it", inputs)
    assert (found.files, found.documents) == (2, 40)
    assert len(found.shards) == found.num_shards > 3


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "as_read", "packing": "best_fit", "chunks": 2},
        {"epochs": 2, "seed": 7, "heldout_fraction": 0.0},
        {"packing": "separate", "bos": "<s>"},
        {"fim": FimSettings(rate=0.5, spm_share=0.5)},
    ],
    ids=["as read, best fit", "epochs", "separate", "fill-in-the-middle"],
)
def test_settings_are_those_of_the_manifest(home: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = home / "datasets" / "it" / "tokenizer.json"
    folder = made(home / "texts", tmp_path / "out", vocab_size=None, tokenizer=tokenizer, **settings)
    whole = again(folder, home / "texts")
    assert whole.documents == 40
    found = again(folder, home / "texts", sample=Sample(0.3, 5))
    assert 0 < len(found.shards) < found.num_shards
    assert again(folder, home / "texts", sample=Sample(1.0, 5)).shards == whole.shards


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "a.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            _lines(lambda lines: [*lines[:7], lines[7].replace("a7", "A7"), *lines[8:]]),
            r"texts/a.jsonl: row 7 of the dataset's is not in it \(\w+/0000\d.h5 has it\); texts/a.jsonl: row 7 of it is not in the dataset",
        ),
        (
            _lines(lambda lines: [*lines[:7], *lines[8:]]),
            r"texts/a.jsonl: row 7 of the dataset's is not in it \(.*\): give",
        ),
        (
            _lines(lambda lines: [*lines, '{"body": "more"}\n']),
            r"a.jsonl: is not the file that .*: texts/a.jsonl: row 20 of it is not in the dataset: give",
        ),
        (_lines(lambda lines: [*lines[1:], lines[0]]), "its documents are the same"),
        (
            lambda folder: (folder / "b.jsonl").unlink(),
            r"texts/b.jsonl is missing, which .*it was made of \(\w+/0000\d.h5 has documents of it\)",
        ),
        (
            lambda folder: shutil.copy(folder / "b.jsonl", folder / "c.jsonl"),
            r"texts/c.jsonl is none of the files that .*it was made of",
        ),
    ],
    ids=["changed", "left out", "added", "in another order", "a file missing", "a file added"],
)
def test_what_is_wrong_missing_or_added_is_named(
    edit: Callable[[Path], Any], words: str, home: Path, inputs: Path
) -> None:
    edit(inputs)
    with pytest.raises(DataError, match=words) as caught:
        again(home / "datasets" / "it", inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            _lines(lambda lines: [*lines[:7], lines[7].replace("a7", "A7"), *lines[8:]]),
            r"a.jsonl: is not the file that .*: \w+/0000\d.h5 \(row \d+, of texts/a.jsonl, row 7\): it is not in it: give",
        ),
        (
            _lines(lambda lines: [*lines, '{"body": "more"}\n']),
            r"a.jsonl: is not the file that .*it was made of, and the shards' documents are in it: give the file itself",
        ),
        (
            _lines(lambda lines: [*lines[1:], lines[0]]),
            r"\(row \d+, of texts/a.jsonl, row \d+\): it is not in it: give",
        ),
        (lambda folder: (folder / "b.jsonl").unlink(), r"b.jsonl is missing, .*\(\w+/0000\d.h5 has documents of it\)"),
        (lambda folder: shutil.copy(folder / "b.jsonl", folder / "c.jsonl"), "c.jsonl is none of the files that"),
    ],
    ids=["changed", "added", "in another order", "a file missing", "a file added"],
)
def test_a_sample_names_file_row_and_shard(edit: Callable[[Path], Any], words: str, home: Path, inputs: Path) -> None:
    edit(inputs)
    with pytest.raises(DataError, match=words) as caught:
        again(home / "datasets" / "it", inputs, sample=Sample(1.0, 0))
    assert "\n" not in str(caught.value)


def test_a_sample_is_drawn_by_its_seed(home: Path) -> None:
    folder = home / "datasets" / "it"
    drawn = [again(folder, home / "texts", sample=Sample(0.3, seed)).shards for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(DataError, match="--sample 0: give a share of the shards, above 0 and up to 1"):
        again(folder, home / "texts", sample=Sample(0.0, 0))
    with pytest.raises(DataError, match="a share of its shards needs them, and they are not here"):
        check_inputs_again(folder, [], {}, LocalExecutor(1), sample=Sample(1.0, 0), shards_here=False)


def test_sources_that_were_named_are_those_of_the_dataset(home: Path, tmp_path: Path) -> None:
    """As a recipe for preparation names them: a source for each file, which nothing else says."""
    sections = [Wanted((str(home / "texts" / f"{name}.jsonl"),), f"of {name}", keys=("body",)) for name in "ba"]
    listed = find_inputs(sections)
    tokenizer = home / "datasets" / "it" / "tokenizer.json"
    settings = {
        "sequence_length": 16,
        "rows_per_shard": 20,
        "tokenizer": tokenizer,
        "heldout_fraction": 0.0,
        "executor": LocalExecutor(1),
    }
    prepared = prepare(
        Inputs(listed.files, "texts", options=ReadOptions(text_key="body", sequence_length=16)),
        tmp_path,
        name="it",
        **settings,
    )
    assert prepared is not None
    files = [home / "texts" / name for name in ("a.jsonl", "b.jsonl")]  # not in the order of the dataset
    assert again(prepared.folder, *files).told_sources == 2
    assert again(prepared.folder, *files, sample=Sample(0.2, 0)).told_sources == 2


def test_a_folder_of_another_name_is_named(home: Path, inputs: Path) -> None:
    other = inputs.rename(inputs.with_name("other"))
    with pytest.raises(DataError, match=r"texts/a.jsonl is missing.* \(and 1 more\): names begin with the folder"):
        again(home / "datasets" / "it", other)


def test_other_ways_of_reading_are_named(home: Path) -> None:
    folder = home / "datasets" / "it"
    with pytest.raises(DataError, match="--reading"):
        again(folder, home / "texts", source_key="body")
    with pytest.raises(DataError, match=r"cannot be prepared as|--reading"):
        again(folder, home / "texts", text_key="text")
    with pytest.raises(DataError, match="--reading colour: how inputs were read is told by text_key"):
        again(folder, home / "texts", colour="red")


def test_tokens_that_are_not_those_of_the_texts_are_found_by_row(home: Path, inputs: Path, tmp_path: Path) -> None:
    """The forged dataset says that it was made of the true files, and all its hashes agree."""
    true = home / "datasets" / "it"
    _lines(lambda lines: [*lines[:7], lines[7].replace("a7", "A7"), *lines[8:]])(inputs)
    forged = made(inputs, tmp_path / "out", vocab_size=None, tokenizer=true / "tokenizer.json")
    shutil.copy(true / "inputs.jsonl", forged / "inputs.jsonl")
    told, honest = read_dataset_manifest(forged), read_dataset_manifest(true)
    own = {"corpus": honest.corpus, "inputs_sha256": honest.inputs_sha256}
    write_dataset_manifest(forged, told.model_copy(update=own))
    with pytest.raises(DataError, match=r"\.h5: does not follow from its inputs \(row \d+, token \d+, of texts/"):
        again(forged, home / "texts")
    with pytest.raises(
        DataError, match=r"\.h5: does not follow from its inputs \(row \d+, of texts/a.jsonl, row 7\): "
    ):
        again(forged, home / "texts", sample=Sample(1.0, 0))


def _one_token(tokens: np.ndarray, table: Documents) -> Documents:
    tokens[1] = 70 if tokens[1] != 70 else 71
    return table


def _another_row(tokens: np.ndarray, table: Documents) -> Documents:
    table.record[0] += 1
    return table


def _a_shorter_document(tokens: np.ndarray, table: Documents) -> Documents:
    """The second document's last token is said to be the third's first."""
    end = table.end.copy()
    end[1] -= 1
    return replace(table, end=end)


def _called_padding(tokens: np.ndarray, table: Documents) -> Documents:
    for column in (table.file, table.source, table.record):
        column[1] = -1
    table.id[1] = 0
    return table


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (_called_padding, "what it calls padding bears loss"),
        (_one_token, r"\d+ ids are not those of the text"),
        (_another_row, "it is not in it"),
        (_a_shorter_document, r"\d+ ids are not those of the text"),
    ],
)
def test_a_shard_that_was_written_again_is_found_in_a_sample(
    forge: Callable[[np.ndarray, Documents], Documents], words: str, home: Path, tmp_path: Path
) -> None:
    """All its hashes agree, and those of the manifest."""
    folder = Path(shutil.copytree(home / "datasets" / "it", tmp_path / "it"))
    manifest = read_dataset_manifest(folder)
    train = manifest.train
    reader = ShardReader(folder / train.shards[0].file)
    tokens = reader.tokens(0, num_tokens(reader.num_rows, 16, manifest.row_stride))
    table = forge(tokens, reader.documents())
    settings = {"sequence_length": 16, "row_stride": manifest.row_stride, "vocab_size": manifest.vocab_size}
    (folder / train.shards[0].file).unlink()
    info = write_shard(reader.path, tokens, table, tokenizer_sha256=manifest.tokenizer_sha256, **settings)
    told = {"num_bytes": info.num_bytes, "sha256": info.sha256, "digest": info.digest}
    shards = (train.shards[0].model_copy(update=told), *train.shards[1:])
    own = train.model_copy(update={"shards": shards, "id": merkle_root(shard.digest for shard in shards)})
    write_dataset_manifest(folder, manifest.model_copy(update={"train": own}))
    with pytest.raises(DataError, match=rf"it/train/00000.h5: does not follow from its inputs \(.*\): {words}: it was"):
        again(folder, home / "texts", sample=Sample(1.0, 0))
    with pytest.raises(DataError, match=r"it/train/00000.h5: does not follow from its inputs \(.*\): it was altered"):
        again(folder, home / "texts")


@pytest.mark.parametrize(
    ("weight", "words"), [(3.0, "the weights of its tokens are not"), (0.0, "the loss mask is not")]
)
def test_weights_that_are_not_those_of_the_records(weight: float, words: str, home: Path, tmp_path: Path) -> None:
    """The forged dataset gives one record another weight, and says that it was made of the true file."""
    path, options = tmp_path / "r.jsonl", ReadOptions(weight_key="w", sequence_length=16)
    settings = {
        "sequence_length": 16,
        "tokenizer": home / "datasets" / "it" / "tokenizer.json",
        "heldout_fraction": 0.0,
    }
    folders = []
    for name, own in (("true", 2.0), ("forged", weight)):
        rows = [{"text": f"{number} weave across", "w": own if number == 3 else 1.0} for number in range(9)]
        rows[0]["w"] = 0.5
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed = find_inputs([Wanted((str(path),))])
        found = prepare(Inputs(listed.files, "texts", options=options), tmp_path / name, name="it", **settings)
        assert found is not None
        folders.append(found.folder)
        if name == "true":
            data = path.read_bytes()
    path.write_bytes(data)
    shutil.copy(folders[0] / "inputs.jsonl", folders[1] / "inputs.jsonl")
    told, honest = (read_dataset_manifest(folder) for folder in folders)
    own_corpus = {"corpus": told.corpus, "inputs_sha256": told.inputs_sha256}
    write_dataset_manifest(folders[1], honest.model_copy(update=own_corpus))
    given: Any = ([str(path)], {"weight_key": "w"}, LocalExecutor(1))
    check_inputs_again(folders[0], *given, sample=Sample(1.0, 0))
    with pytest.raises(DataError, match=rf"\(row \d+, of r.jsonl, row 3\): {words}"):
        check_inputs_again(folders[1], *given, sample=Sample(1.0, 0))


def test_a_tokenizer_that_was_not_trained_so_is_found(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "datasets" / "it", tmp_path / "it"))
    manifest = read_dataset_manifest(folder)
    value = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(value, indent=1))
    from weftrain.core.formats.fsops import sha256_file

    other = {"tokenizer_sha256": sha256_file(folder / "tokenizer.json")}
    write_dataset_manifest(folder, manifest.model_copy(update=other))
    with pytest.raises(DataError, match="is not the tokenizer that is trained on its inputs"):
        again(folder, home / "texts")


def test_a_dataset_that_grew_twice_is_grown_again(home: Path, tmp_path: Path) -> None:
    """The inputs of all times together, of which two have one name; other ones are named."""
    given, tokenizer = [home / "texts"], home / "datasets" / "it" / "tokenizer.json"
    folder = made(given[0], tmp_path / "out0", vocab_size=None, tokenizer=tokenizer, rows_per_shard=80)
    for time in (1, 2):
        given.append(tmp_path / f"time{time}" / "texts")
        texts(given[-1], seed=time)
        (given[-1] / "b.jsonl").rename(given[-1] / f"c{time}.jsonl")
        folder = made(given[-1], tmp_path / f"out{time}", vocab_size=None, rows_per_shard=None, grow=folder)
    found = again(folder, *given)
    assert (found.files, len(found.shards)) == (6, found.num_shards)
    assert found.documents == 120
    again(folder, *given, sample=Sample(1.0, 0))
    with pytest.raises(
        DataError, match=r"a.jsonl: is not the file .*; 3 of its inputs have this name, and are given in"
    ):
        again(folder, given[0], given[2], given[1], sample=Sample(1.0, 0))
    with pytest.raises(DataError, match=r"texts/a.jsonl is missing, which .*out2/it was made of"):
        again(folder, *given[:2])
    more = texts(tmp_path / "more" / "texts", seed=9)
    with pytest.raises(DataError, match=r"texts/a.jsonl is none of the files that .*it was made of once more"):
        again(folder, *given, more)


def _records(kind: str, seed: int = 1) -> list[dict[str, Any]]:
    """Twelve of a kind: texts with weights, conversations, pairs, or rows that are packed."""
    draw = random.Random(f"{kind} {seed}")

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    if kind == "weights":
        return [{"text": words(20), "w": draw.choice((0.0, 0.5, 1.0, 2.0))} for _ in range(12)]
    if kind == "conversations":
        return [
            {"messages": [{"role": role, "content": words(4)} for _ in range(2) for role in ("user", "assistant")]}
            for _ in range(12)
        ]
    if kind == "pairs":
        return [{"prompt": words(4), "chosen": words(3), "rejected": words(5)} for _ in range(12)]
    return [{"token_ids": draw.choices(range(40, 200), k=33)} for _ in range(12)]


_KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("--weight-key", "w"),
    "conversations": ("--chat-template", "chatml", "--too-long", "split"),
    "pairs": ("--preferences", "pairs"),
    "rows": ("--format", "amber"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_sample_of_every_kind_of_record(kind: str, home: Path, tmp_path: Path) -> None:
    """Rows with loss masks and weights, and rows that arrive packed: the same, and with one record exchanged."""
    records, options = _records(kind), _KINDS[kind]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = home / "datasets" / "it" / "tokenizer.json"
    words = ["prep", path, "--name", "it", "--output", tmp_path, "--tokenizer", tokenizer, "--workers", 1, *options]
    length = 56 if kind == "conversations" else 32  # which is shorter than some of them
    words += ["--sequence-length", length, "--rows-per-shard", 4, "--heldout-fraction", 0]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    reading = {"weights": {"weight_key": "w"}, "rows": {"format": "amber"}}.get(kind, {})

    def sampled(share: float) -> Any:
        return check_inputs_again(tmp_path / "it", [str(path)], reading, LocalExecutor(1), sample=Sample(share, 3))

    found = sampled(1.0)
    assert len(found.shards) == found.num_shards > 2
    assert len(sampled(0.3).shards) < found.num_shards
    other = _records(kind)
    other[4] = _records(kind, seed=2)[4]
    path.write_text("".join(json.dumps(record) + "\n" for record in other))
    with pytest.raises(DataError, match=r"records.jsonl: is not the file that .*, of records.jsonl, row 4\): "):
        sampled(1.0)
