"""The survey of all parts: sources numbered in order of appearance, and the list of inputs with what was skipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import open_inputs, open_sources, verify_tables
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.documents import SkippedFile
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MEBI", 5000)


def inputs_of(path: Path, rows: list[dict[str, str]], **changes: object) -> Inputs:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = tuple(list_inputs([str(path)], source=None))
    return dataclasses.replace(Inputs(files, "text", "none", ReadOptions(source_key="url")), **changes)  # type: ignore[arg-type]


def test_more_names_than_an_attribute_holds(tmp_path: Path, encoder: TextEncoder) -> None:
    """Three times the 60,000 bytes that shards once held: each document has its own line's name, and stats shows the
    largest few.
    """
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    # some twice, one in every part
    names = [f"https://example.org/{'x' * 60}/{row // 2 if row % 4 else 0}" for row in range(2000)]
    rows = [{"text": f"the weft is {row} " + "again " * (row % 7), "url": name} for row, name in enumerate(names)]
    settings = {"name": "d", "tokenizer": tmp_path / "tokenizer.json", "sequence_length": 16}
    prepared = prepare(inputs_of(tmp_path / "t.jsonl", rows), tmp_path, **settings, rows_per_shard=300)
    assert prepared is not None
    manifest = prepared.manifest
    sources = open_sources(prepared.folder, manifest)
    assert [source.name for source in sources] == list(dict.fromkeys(names))
    assert len("".join(source.name for source in sources)) > 60_000
    assert sum(source.documents for source in sources) == manifest.documents.train
    seen = 0
    for set_name in manifest.sets:
        for reader in ShardSet(prepared.folder, manifest, set_name).readers():
            table = reader.documents()
            assert [sources[source].name for source in table.source] == [names[record] for record in table.record]
            seen += len(table.record)
    assert seen >= 2000 - 2
    stats = CliRunner().invoke(main, ["data", "stats", str(prepared.folder)]).output.splitlines()
    assert sum(line.startswith("source ") for line in stats) == 21
    assert f"{len(sources) - 20 - sum(source.documents == 0 for source in sources):,} more" in stats[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("<padding>", "t.jsonl:2: the source's name is <padding>, which stands for what fills rows"),
        ("x" * 2049, "t.jsonl:2: the source's name is 2,049 characters long, 2,048 are allowed"),
    ],
)
def test_what_cannot_be_a_name(tmp_path: Path, encoder: TextEncoder, name: str, message: str) -> None:
    """A document's failure, in the budget: a field of text named by mistake fills no memory."""
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    rows = [{"text": "the weft " * 9, "url": "a"}, {"text": "a warp", "url": name}]
    arguments = {"name": "d", "tokenizer": tmp_path / "tokenizer.json", "sequence_length": 16, "heldout_fraction": 0.0}
    with pytest.raises(DataError, match=message):
        prepare(inputs_of(tmp_path / "t.jsonl", rows), tmp_path, **arguments)
    prepared = prepare(inputs_of(tmp_path / "t.jsonl", rows), tmp_path, **arguments, max_failures=1)
    assert prepared is not None
    assert prepared.manifest.documents.failed == 1


def test_files_that_were_left_out_are_listed_and_counted(tmp_path: Path, encoder: TextEncoder) -> None:
    """After the files that were read, so that no document's number of a file changes."""
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    skipped = (
        SkippedFile("in/.x", 3, "hidden file"),
        SkippedFile("in/a.gz.part", 9, "unfinished download"),
        SkippedFile("in/.y", 0, "hidden file"),
    )
    inputs = inputs_of(tmp_path / "t.jsonl", [{"text": "the weft " * 9, "url": "a"}], skipped=skipped)
    arguments = {"name": "d", "tokenizer": tmp_path / "tokenizer.json", "sequence_length": 16, "heldout_fraction": 0.0}
    prepared = prepare(inputs, tmp_path, **arguments)
    assert prepared is not None
    assert prepared.manifest.inputs_skipped == {"hidden file": 2, "unfinished download": 1}
    verify_tables(prepared.folder, prepared.manifest)
    entries = [
        (entry.name, entry.num_bytes, len(entry.sha256), entry.skipped)
        for entry in open_inputs(prepared.folder, prepared.manifest)
    ]
    assert entries == [
        ("t.jsonl", inputs.files[0].num_bytes, 1, None),
        *((one.name, one.num_bytes, 0, one.reason) for one in skipped),
    ]
    again = prepare(inputs, tmp_path, **arguments)
    assert again is not None
    assert again.up_to_date
    stats = CliRunner().invoke(main, ["data", "stats", str(prepared.folder)]).output
    assert "skipped      3 files: 2 hidden file, 1 unfinished download; inputs.jsonl names them" in stats
    verified = CliRunner().invoke(main, ["data", "verify", str(prepared.folder)]).output
    assert "1 inputs (3 more were skipped) and of 1 sources agree" in verified
