"""A dataset that is there already: whatever is asked for and recorded otherwise is refused or said, never ignored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.documents import SkippedFile
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder


def prepared(folder: Path, encoder: TextEncoder, arguments: dict[str, Any] | None = None, **inputs: Any) -> Prepared:
    """prepare() of one text and one line that cannot be read, which is allowed."""
    (folder / "tokenizer.json").write_bytes(encoder.data)
    if not (folder / "t.jsonl").exists():
        (folder / "t.jsonl").write_text(json.dumps({"text": "the weft " * 9}) + "\n{}\n")
    files = tuple(list_inputs([str(folder / "t.jsonl")], source=None))
    chosen = dataclasses.replace(Inputs(files, "text"), **inputs)
    settings = {
        "name": "d",
        "tokenizer": folder / "tokenizer.json",
        "sequence_length": 16,
        "heldout_fraction": 0.0,
        "max_failures": 1,
    }
    made = prepare(chosen, folder, **settings | (arguments or {}))
    assert made is not None
    return made


def test_what_is_asked_for_and_recorded_otherwise(tmp_path: Path, encoder: TextEncoder) -> None:
    """Licence and failures are refused with what can be done; the engine and other files skipped are said."""
    skipped = (SkippedFile("in/.x", 3, "hidden file"),)
    first = prepared(tmp_path, encoder, {"engine": "tokenizers"}, licence="MIT", skipped=skipped)
    assert (first.up_to_date, first.manifest.corpus.licence) == (False, "MIT")
    for arguments, licence, notes in (
        ({}, "MIT", ()),
        ({}, "not stated", ()),
        ({"engine": "tokenizers"}, "MIT", ()),
        (
            {"engine": "gigatoken"},
            "MIT",
            ("its documents were encoded by tokenizers, not by gigatoken; the ids are the same",),
        ),
    ):
        again = prepared(tmp_path, encoder, arguments, licence=licence, skipped=skipped)
        assert (again.up_to_date, again.notes) == (True, notes)
    others = prepared(tmp_path, encoder, licence="MIT").notes
    assert others == ("files skipped: none; when it was prepared: 1 hidden file",)
    with pytest.raises(
        DataError, match=r"recorded with licence 'MIT', not 'CC0-1\.0': leave --licence out, or give another --name"
    ):
        prepared(tmp_path, encoder, licence="CC0-1.0")
    with pytest.raises(
        DataError, match=r"1 documents could not be read .*failures.jsonl\), --max-failures allows 0: allow them, or"
    ):
        prepared(tmp_path, encoder, {"max_failures": 0})


def test_which_file_is_another(tmp_path: Path, encoder: TextEncoder) -> None:
    """The first file that differs is named, and how: by number of files, size, or contents alone."""
    prepared(tmp_path, encoder)
    text = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(text.replace("weft", "warp"))
    with pytest.raises(DataError, match=r"'t.jsonl' held something else; give another --name"):
        prepared(tmp_path, encoder)
    (tmp_path / "t.jsonl").write_text(text + "{}\n")
    with pytest.raises(DataError, match=r"file 1 was 't.jsonl' of \d+ bytes, and here is 't.jsonl' of \d+ bytes; give"):
        prepared(tmp_path, encoder)
    (tmp_path / "u.jsonl").write_text("{}\n")
    two = tuple(list_inputs([str(tmp_path / "t.jsonl"), str(tmp_path / "u.jsonl")], source=None))
    with pytest.raises(DataError, match="was prepared from 1 files, and these are 2; give another --name"):
        prepared(tmp_path, encoder, files=two)


def test_the_embedded_corpus_takes_no_options_of_inputs(tmp_path: Path) -> None:
    """They were ignored."""
    for option in ("--licence", "--text-key", "--source-key", "--suffix", "--format"):
        refused = CliRunner().invoke(main, ["prep", "--output", str(tmp_path), option, "x"])
        assert refused.exit_code == 2
        assert f"{option} says what INPUTS are" in refused.output
