"""datatrove's .ds, written by datatrove itself where it is installed, and built here by hand."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

DOCUMENTS = [[1, 2, 3, 4], [5], [], [6, 70, 65_535]]


def write(folder: Path, width: int = 2, loss: Sequence[int] | None = None, metadata: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "00000_unshuffled.ds"
    path.write_bytes(np.concatenate([np.array(ids, f"<u{width}") for ids in DOCUMENTS]).tobytes())
    Path(f"{path}.index").write_bytes(np.cumsum([len(ids) for ids in DOCUMENTS]).astype("<u8").tobytes())
    if loss is not None:
        Path(f"{path}.loss").write_bytes(bytes(loss))
    if metadata is not None:
        Path(f"{path}.metadata").write_text(metadata)
    return path


def tokens(items: Sequence[Document | Failure]) -> list[list[int]]:
    assert all(
        isinstance(item, Document) and item.tokens is not None and item.tokens.dtype == np.int32 for item in items
    ), items
    return [item.tokens.tolist() for item in items if isinstance(item, Document) and item.tokens is not None]


@pytest.mark.parametrize("width", [2, 4])
def test_documents_and_their_loss_masks_in_any_cut(tmp_path: Path, read_all: Callable[..., Any], width: int) -> None:
    write(tmp_path / "in", width, [1, 0, 1, 1, 1, 0, 0, 1], f"some/tokenizer|{width}\n8\n8 T")
    for part_bytes in (1 << 40, 4, 1):
        items = read_all(tmp_path / "in", part_bytes)
        assert tokens(items) == DOCUMENTS
        assert [item.record for item in items] == [0, 1, 2, 3]
        assert [None if item.marks is None else item.marks.tolist() for item in items] == [
            [1, 0, 1, 1],
            None,
            None,
            [0, 0, 1],
        ]
    assert len(list_inputs([str(tmp_path / "in")], source=None)) == 1


def test_files_that_datatrove_writes(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    tokenizer = pytest.importorskip(
        "datatrove.pipeline.tokens.tokenizer", reason="datatrove is not installed: pip install 'weftrain[quality]'"
    )
    written = tokenizer.TokenizedFile(
        str(tmp_path), "00000_shuffled.ds", save_loss_metadata=True, save_final_metadata=True, token_size=4
    )
    loss = [np.array([True] * len(ids)) for ids in DOCUMENTS]
    loss[0][1] = False
    for ids, mask in zip(DOCUMENTS, loss, strict=True):
        written.write(ids, mask)
    written.close()
    items = read_all(tmp_path)
    assert tokens(items) == DOCUMENTS
    assert items[0].marks.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("mode", ["exact", "context", "released"])
def test_a_loss_mask_and_fill_in_the_middle_do_not_go_together(tmp_path: Path, encoder: TextEncoder, mode: str) -> None:
    path = write(tmp_path / "in", loss=[1, 0, 1, 1, 1, 0, 0, 1])
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "ids", "none", ReadOptions(sequence_length=4))
    fim = FimSettings.model_validate({"rate": 1.0, "spm_share": 0.5, "mode": mode})
    with pytest.raises(DataError, match=r"_unshuffled\.ds:1: has a loss mask.* leave --fim-rate or the mask out"):
        prepare(inputs, tmp_path / "out", name="d", tokenizer=tmp_path / "tokenizer.json", sequence_length=4, fim=fim)


def test_a_dataset_keeps_the_loss_mask_of_each_token(tmp_path: Path, encoder: TextEncoder) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(10, 300, count) for count in random.integers(1, 30, 40)]
    masks = [random.integers(0, 2, len(ids)) for ids in documents]
    path = tmp_path / "a.ds"
    path.write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    Path(f"{path}.index").write_bytes(np.cumsum([len(ids) for ids in documents]).astype("<u8").tobytes())
    Path(f"{path}.loss").write_bytes(np.concatenate(masks).astype("u1").tobytes())
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "ids", "none", ReadOptions(sequence_length=16))
    prepared = prepare(
        inputs,
        tmp_path / "out",
        name="d",
        tokenizer=tmp_path / "tokenizer.json",
        sequence_length=16,
        heldout_fraction=0.0,
        order="as_read",
    )
    assert prepared is not None
    shards = ShardSet(prepared.folder, prepared.manifest, "train")
    ids, mask = shards.rows(np.arange(shards.num_rows))
    stream = np.concatenate([np.append(document, encoder.eos_id) for document in documents])
    bears = np.concatenate([np.append(document, 1) for document in masks])
    assert mask is not None
    for place in range(shards.num_rows):
        assert np.array_equal(ids[place], stream[place * 16 : place * 16 + 17])
        assert np.array_equal(mask[place], bears[place * 16 + 1 : place * 16 + 17])


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        (".index", None, r"has no 00000_unshuffled\.ds\.index beside it"),
        (".index", b"", "0 bytes, which are no ends of documents"),
        (".index", b"1234567", "7 bytes, which are no ends of documents"),
        (".index", np.array([4, 5, 5, 9], "<u8").tobytes(), "its last document ends at id 9, and 16 bytes"),
        (".index", np.array([4, 3, 5, 8], "<u8").tobytes(), "do not rise to 8"),
        (".index", np.array([4, 2**63, 5, 8], "<u8").tobytes(), "do not rise to 8"),
        (".loss", b"\1" * 7, "has not one byte for each of the 8 ids"),
        (".metadata", b"t|4\n8", "says that an id takes 4 bytes, the index that it takes 2"),
    ],
)
def test_what_contradicts_the_ids(
    tmp_path: Path, read_all: Callable[..., Any], suffix: str, data: bytes | None, message: str
) -> None:
    path = write(tmp_path)
    beside = Path(f"{path}{suffix}")
    if data is None:
        beside.unlink()
    else:
        beside.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_all(path)


def test_a_loss_mask_that_is_none_fails_its_document(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    items = read_all(write(tmp_path, loss=[1, 1, 2, 1, 1, 1, 1, 1]))
    assert [isinstance(item, Failure) for item in items] == [True, False, False, False]


def test_files_of_another_file_system_are_refused_by_name(read_all: Callable[..., Any]) -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    system.pipe_file(f"{base}/a.ds", b"1234")
    with pytest.raises(DataError, match=r"datatrove's \.ds files are read from local folders only"):
        read_all(root)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["", ".index", ".loss", ".metadata"]), st.integers(0, 40), st.binary(max_size=9), st.booleans())
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], suffix: str, place: int, data: bytes, cut: bool
) -> None:
    path = write(tmp_path / uuid.uuid4().hex, loss=[1] * 8, metadata="t|2\n8\n")
    damaged = Path(f"{path}{suffix}")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    check_damaged(path, 5)
