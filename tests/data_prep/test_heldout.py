"""Held-out documents: no copy of one is trained on, whatever its white space and whether it came as text or as
tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.cli.main import main
from weftrain.core.formats.dataset import read_dataset_manifest, write_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep import heldout
from weftrain.data_prep.heldout import is_held_out, text_hash
from weftrain.data_prep.interchange import export_megatron
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.documents import Document
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

FRACTION = 0.4
ACCENTS = "the wëft îs çarried — “åcross” a wärp"


def make(folder: Path, path: Path, name: str, *, options: ReadOptions | None = None, **changes: Any) -> Prepared:
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), name, "none", options or ReadOptions())
    given: dict[str, Any] = {
        "tokenizer": folder / "tokenizer.json",
        "sequence_length": 8,
        "heldout_fraction": FRACTION,
    }
    prepared = prepare(inputs, folder / "out", name=name, **given | changes)
    assert prepared is not None
    return prepared


def lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def documents(tmp_path: Path, encoder: TextEncoder, texts: list[str]) -> list[str]:
    """Sixty texts, some with accents, and their tokenizer beside them."""
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    return [f"{text} {ACCENTS if index % 3 == 0 else ''}".strip() for index, text in enumerate(texts[:60])]


def held_records(prepared: Prepared, set_name: str) -> set[int]:
    """The numbers of the lines whose documents are in a set, of which at most the last is not in a row."""
    readers = ShardSet(prepared.folder, prepared.manifest, set_name).readers()  # type: ignore[arg-type]
    return {int(record) for reader in readers for record in reader.documents().record if record >= 0}


def rows_of(documents: list[str], encoder: TextEncoder) -> list[list[int]]:
    """A row of 512 + 1 ids each: a start token, the document, and end tokens to the end."""
    return [([1, *ids.tolist()] + [encoder.eos_id] * 513)[:513] for ids in encoder.encode(documents, documents)]


COPIES = {
    "one more newline": lambda text: text + "\n",
    "trailing spaces": lambda text: "".join(line + "   \n" for line in text.split(" ")),
    "CRLF, a BOM and a no-break space": lambda text: "\ufeff" + text.replace(" ", "\r\n", 2).replace(" ", "\xa0", 1),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
}


def test_no_copy_of_a_held_out_document_is_trained_on(
    tmp_path: Path, documents: list[str], encoder: TextEncoder
) -> None:
    # every document is in a row
    first = make(tmp_path, lines(tmp_path / "a.jsonl", documents), "a", packing="best_fit")
    held = held_records(first, "heldout")
    assert 15 < len(held) < 35
    for number, (what, change) in enumerate(COPIES.items()):
        copied = make(
            tmp_path,
            lines(tmp_path / f"{number}.jsonl", [change(text) for text in documents]),
            f"c{number}",
            packing="best_fit",
        )
        assert held_records(copied, "heldout") == held, what
    # Tokenised by another program: a Megatron pair, and rows of one document each.
    whole = lines(tmp_path / "whole.jsonl", [*documents, "the last, which is cut at the end of the rows"])
    export = make(tmp_path, whole, "all", heldout_fraction=0.0, order="as_read")
    export_megatron(export.folder, "train", tmp_path / "megatron" / "m")
    pair = make(tmp_path, tmp_path / "megatron", "megatron", packing="best_fit")
    assert held_records(pair, "heldout") - {60} == held
    written = (json.dumps({"token_ids": row, "source": "s"}) + "\n" for row in rows_of(documents, encoder))
    (tmp_path / "rows.jsonl").write_text("".join(written))
    rows = make(
        tmp_path, tmp_path / "rows.jsonl", "rows", sequence_length=512, options=ReadOptions(sequence_length=512)
    )
    assert held_records(rows, "heldout") == held
    # A larger fraction holds out these and more.
    assert (
        held_records(make(tmp_path, tmp_path / "a.jsonl", "more", packing="best_fit", heldout_fraction=0.7), "heldout")
        > held
    )


def test_a_dataset_of_rule_1_is_still_up_to_date_and_says_so(tmp_path: Path, documents: list[str]) -> None:
    path = lines(tmp_path / "a.jsonl", documents)
    command = [
        "prep",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--name",
        "a",
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
    ]
    command += ["--sequence-length", "8", "--heldout-fraction", str(FRACTION)]
    assert CliRunner().invoke(main, command).exit_code == 0
    result = CliRunner().invoke(main, command)
    assert "is up to date" in result.output
    assert "by rule" not in result.output
    manifest = read_dataset_manifest(tmp_path / "out" / "a")
    assert manifest.heldout_rule == 2
    old = {key: value for key, value in manifest.preparation.items() if key != "heldout_rule"}
    write_dataset_manifest(tmp_path / "out" / "a", manifest.model_copy(update={"preparation": old}))
    assert read_dataset_manifest(tmp_path / "out" / "a").heldout_rule == 1
    result = CliRunner().invoke(main, command)
    assert "is up to date" in result.output
    assert "held out by rule 1" in result.output


def test_the_rules_by_hand() -> None:
    text = Document(0, 0, "s", "a\u0301 b\n")
    content = hashlib.sha256("a\u0301 b\n".encode()).digest()
    for rule, owner in ((1, content), (2, hashlib.sha256("\xe1b".encode()).digest())):
        share = int.from_bytes(hashlib.sha256(b"heldout " + owner).digest()[:8]) / 2**64
        assert is_held_out(text, content, rule, share * 1.001)
        assert not is_held_out(text, content, rule, share * 0.999)
        other = Document(0, 1, "s", "something else", belongs_to=text.text)
        assert is_held_out(other, b"", rule, share * 1.001)
        assert not is_held_out(other, b"", rule, share * 0.999)


@settings(deadline=None, max_examples=150)
@given(
    st.text(max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(" \t\r\n\x1f\x85\xa0\u2003\u3000\ufeff")), max_size=6),
)
def test_white_space_and_canonical_equivalents_do_not_count(text: str, added: list[tuple[int, str]]) -> None:
    spread = text
    for place, space in added:
        spread = spread[:place] + space + spread[place:]
    plain = "".join(text.replace("\ufeff", "").split())
    assert text_hash(spread) == text_hash(text) == text_hash(plain)
    assert text_hash(unicodedata.normalize("NFD", plain)) == text_hash(plain)


def test_a_run_of_combining_marks_takes_no_quadratic_time() -> None:
    """A hundred thousand of them would take NFC half a minute."""
    assert text_hash("a" + "\u0301\u0316" * 50_000) == text_hash("a" + "\u0316" * 50_000 + "\u0301" * 50_000)


@settings(max_examples=150, deadline=None)
@given(
    st.text(
        st.sampled_from("aé e\u0301\u0323\u1100\u1161\u11a8가\u3000\n7_かか\u3099क\u093c" + "\u0301" * 3), max_size=60
    ),
    st.integers(1, 9),
)
def test_a_long_text_is_hashed_in_pieces_as_it_would_be_whole(text: str, piece: int) -> None:
    whole = text_hash(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "_PIECE_CHARACTERS", piece)
        assert text_hash(text) == whole
        many = text + "a" + "\u0301\u0323" * 200 + "e\u0301" * 5
        in_pieces = text_hash(many)
    assert in_pieces == text_hash(many)
