"""Small shards with random documents, and what they must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from weftrain.core.formats.shard_format import Documents, FimRecord, num_tokens, write_shard
from weftrain.core.formats.shard_reader import ShardReader

TOKENIZER = "ab" * 32


def documents_of(length: int, rng: np.random.Generator) -> Documents:
    end = np.unique(np.append(rng.integers(1, length + 1, 5), length))
    identity = rng.integers(0, 256, (len(end), 16)).astype(np.uint8)
    source, file = (rng.integers(0, 2, len(end)).astype(np.int32) for _ in range(2))
    split = np.sort(rng.integers(0, 100, (len(end), 2)), axis=1)
    fim = FimRecord(rng.integers(0, 3, len(end)), split)
    return Documents(end, identity, source, 2, file, rng.integers(0, 1 << 40, len(end)), fim)


def few_documents(
    end: list[int],
    source: list[int],
    num_sources: int,
    id_bytes: int = 16,
    fim: FimRecord | None = None,
    **origin: list[int],
) -> Documents:
    number = len(end)
    file, record = (np.array(origin.get(name, [0] * number)) for name in ("file", "record"))
    return Documents(
        np.array(end), np.zeros((number, id_bytes), np.uint8), np.array(source), num_sources, file, record, fim
    )


def make(
    path: Path,
    *,
    rows: int = 40,
    sequence_length: int = 16,
    independent: bool = False,
    vocab_size: int = 5000,
    mask: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, Documents, np.ndarray | None]:
    """Write a random shard; its tokens, documents and loss mask."""
    rng = np.random.default_rng(seed)
    stride = sequence_length + independent
    tokens = rng.integers(0, vocab_size, num_tokens(rows, sequence_length, stride))
    documents, loss_mask = documents_of(len(tokens), rng), rng.integers(0, 2, len(tokens)) if mask else None
    write_shard(
        path,
        tokens,
        documents,
        sequence_length=sequence_length,
        row_stride=stride,
        vocab_size=vocab_size,
        tokenizer_sha256=TOKENIZER,
        loss_mask=loss_mask,
    )
    return tokens, documents, loss_mask


def windows(stream: np.ndarray, sequence_length: int, stride: int) -> np.ndarray:
    """Row by row from the definition."""
    rows = (len(stream) - sequence_length - 1) // stride + 1
    return np.stack([stream[row * stride : row * stride + sequence_length + 1] for row in range(rows)])


def assert_holds(reader: ShardReader, tokens: np.ndarray, documents: Documents, mask: np.ndarray | None) -> None:
    everything = np.arange(reader.num_rows)
    ids = reader.rows(everything)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, windows(tokens, reader.sequence_length, reader.row_stride))
    read_mask = reader.plane("loss_mask", everything)
    assert (read_mask is None) == (mask is None)
    if mask is not None:
        assert read_mask is not None
        assert read_mask.dtype == np.bool_
        assert np.array_equal(read_mask, windows(mask, reader.sequence_length, reader.row_stride)[:, 1:])
    read = reader.documents()
    assert np.array_equal(read.end, documents.end)
    assert np.array_equal(read.id, documents.id)
    assert np.array_equal(read.source, documents.source)
    assert read.num_sources == documents.num_sources
    assert np.array_equal(read.file, documents.file)
    assert np.array_equal(read.record, documents.record)
    assert read.fim is not None
    assert documents.fim is not None
    assert np.array_equal(read.fim.mode, documents.fim.mode)
    assert np.array_equal(read.fim.split, documents.fim.split)


def check_boundaries(reader: ShardReader, documents: Documents) -> None:
    """document_starts and spans, each from the definition, token by token."""
    of_position = np.searchsorted(documents.end, np.arange(documents.end[-1]), side="right")
    rows = np.arange(reader.num_rows)
    starts = reader.document_starts(rows)
    assert starts.dtype == np.int32
    for row in rows.tolist():
        first = row * reader.row_stride
        inside = of_position[first : first + reader.sequence_length]
        expected = [int(np.flatnonzero(inside == document)[0]) for document in inside]
        assert starts[row].tolist() == expected
        spans = reader.document_spans(row)
        assert [span.id for span in spans] == [documents.id[document].tobytes() for document in np.unique(inside)]
        assert [(span.first, span.last) for span in spans] == [
            (int(np.flatnonzero(inside == document)[0]), int(np.flatnonzero(inside == document)[-1]))
            for document in np.unique(inside)
        ]
        assert documents.fim is not None
        for span, document in zip(spans, np.unique(inside), strict=True):
            assert (span.file, span.record) == (documents.file[document], documents.record[document])
            assert span.fim == (documents.fim.mode[document], *documents.fim.split[document])


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        change(file)
