"""The token-shard file: its layout, its consistency rules and its one writer. core/formats/shard_reader.py reads it.

Rank-1 `data` holds the token stream. Row i is data[i*row_stride : i*row_stride + sequence_length + 1]: its inputs, and
the label of the last one. At stride sequence_length a row shares a token with the next row; at stride sequence_length
+ 1, as in Amber's data, rows are independent.

| dataset        | type                              | meaning                                                         |
|----------------|-----------------------------------|-----------------------------------------------------------------|
| `data`         | uint16 (vocab <= 65,536) or int32 | token ids; contiguous and page-aligned, so it can be mapped     |
| `doc_end`      | int64 [documents]                 | end of each document's tokens here; the last equals len(data)   |
| `doc_id`       | uint8 [documents, 16]             | first 16 bytes of the SHA-256 of the document's text            |
| `doc_source`   | int32 [documents]                 | line of the dataset's `sources.jsonl`, from 0; -1 for padding   |
| `doc_file`     | int32 [documents]                 | line of the dataset's `inputs.jsonl`, from 0                    |
| `doc_record`   | int64 [documents]                 | line or row of that input file, from 0                          |
| `doc_fim`      | int32 [documents, 3], optional    | FIM mode and the two cuts, see FimRecord                        |
| `loss_mask`    | uint8 [len(data)], optional       | 1 where the token, as a label, bears loss                       |
| `token_weights`| float32 [len(data)], optional     | by what the loss of the token, as a label, is multiplied        |
| `block_digest` | uint8 [blocks, 32]                | SHA-256 of each 1 MiB of `data` and its part of both planes     |

HDF5 verifies nothing: it follows links out of the file, reads zeros for missing data and passes on flipped bits. So
opening a shard checks everything but `data` against the attribute `digest`, and each block of `data` is checked against
its own digest and the vocabulary at its first access. The attribute `num_sources` is the dataset's number of sources
when the shard was written; it bounds `doc_source`. A document cut by a shard's end continues in the next under the same
id. Padding is a document too: id of zeros, source, file and record -1, its tokens masked.

The planes `loss_mask` and `token_weights` say of each token what it is worth as a label. Weights are float32, as the
loss is computed: float16 would round 0.1 by 2e-4, and every weight that a file of text spells with seven digits comes
back as it was given. A weight is 0 where `loss_mask` is 0, and elsewhere between LEAST_WEIGHT and MOST_WEIGHT, since
losses are added up in float32, where a much smaller one would leave no trace. A shard with weights is of format 4, so
that a program which knows none refuses it; all others are of format 3.

Shards of format 2 stay readable: they hold the sources' names in the attribute `sources`, padding as the last of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from weftrain.core.errors import DataError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json

FORMAT = b"weftrain-shard/3"
FORMAT_4 = b"weftrain-shard/4"  # with token weights
FORMAT_2 = b"weftrain-shard/2"
BLOCK_BYTES = 1 << 20
ALIGNMENT = 4096
ID_BYTES = 16
PADDING = "<padding>"  # in place of a source's name, where tokens only fill a row
INTEGERS = ("n_examples", "sequence_length", "row_stride", "vocab_size", "num_sources")
STRINGS = {"format": 64, "tokenizer_sha256": 64, "digest": 64}  # attribute -> most bytes
INTEGERS_2 = INTEGERS[:4]
STRINGS_2 = STRINGS | {"sources": 60_000}
TABLES: dict[str, tuple[np.dtype[Any], int]] = {  # dataset -> (type, rank), in the digest's order
    "doc_end": (np.dtype("<i8"), 1),
    "doc_id": (np.dtype("|u1"), 2),
    "doc_source": (np.dtype("<i4"), 1),
    "doc_file": (np.dtype("<i4"), 1),
    "doc_record": (np.dtype("<i8"), 1),
    "block_digest": (np.dtype("|u1"), 2),
}
FIM = "doc_fim"
LOSS_MASK, TOKEN_WEIGHTS = "loss_mask", "token_weights"
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # of a token that bears loss


class Plane(NamedTuple):
    """What a shard may hold of each token besides its id. stored, read: its type in the file and in a batch. absent:
    the value of every token of a shard that does not have the plane.
    """

    stored: np.dtype[Any]
    read: np.dtype[Any]
    absent: bool | float


PLANES: dict[str, Plane] = {  # by the names of `Batch`, in the digest's order
    LOSS_MASK: Plane(np.dtype("|u1"), np.dtype(np.bool_), True),
    TOKEN_WEIGHTS: Plane(np.dtype("<f4"), np.dtype(np.float32), 1.0),
}
OPTIONAL = {*PLANES, FIM}


@dataclass(frozen=True)
class FimRecord:
    """How each document was turned into fill-in-the-middle. mode uint8 [n]: 0 not, 1 PSM, 2 SPM.

    split int32 [n, 2]: prefix [0, a), middle [a, b), suffix [b, ...), in tokens of the whole original document without
    start and end tokens, even if the shard holds only a part of it. In a dataset with FIM mode `context`, each piece of
    a document in a row has its own cuts, counted from the piece's first token.
    """

    mode: np.ndarray
    split: np.ndarray


@dataclass(frozen=True)
class Documents:
    """A shard's documents in order: end int64 [n], id uint8 [n, 16], and their origin.

    source int32 [n]: line of the dataset's `sources.jsonl`, from 0, of which there are num_sources. file int32 [n]:
    line of `inputs.jsonl`, from 0. record int64 [n]: line or row of that file, from 0. All three are -1 for padding.
    """

    end: np.ndarray
    id: np.ndarray
    source: np.ndarray
    num_sources: int
    file: np.ndarray
    record: np.ndarray
    fim: FimRecord | None = None


@dataclass(frozen=True)
class ShardInfo:
    """What was written. sha256: of the file. digest: the attribute `digest`, which commits to all contents."""

    num_bytes: int
    sha256: str
    digest: str
    num_rows: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id fits, else int32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def num_tokens(num_rows: int, sequence_length: int, row_stride: int) -> int:
    """Length of `data` for that many rows."""
    return (num_rows - 1) * row_stride + sequence_length + 1


def write_shard(
    path: Path,
    tokens: np.ndarray,
    documents: Documents,
    *,
    sequence_length: int,
    row_stride: int,
    vocab_size: int,
    tokenizer_sha256: str,
    loss_mask: np.ndarray | None = None,
    token_weights: np.ndarray | None = None,
) -> ShardInfo:
    """Write a shard atomically; equal arguments give equal bytes. The whole file is first built in memory.

    tokens: integers [length], length = num_tokens(rows, ...) for some rows >= 1. loss_mask: bool or uint8 [length].
    token_weights: floats [length], whatever they are where loss_mask is 0. Raises ValueError for inconsistent
    arguments, DataError if the file cannot be written.
    """
    num_rows = 1 + (len(tokens) - sequence_length - 1) // row_stride
    header: dict[str, Any] = {
        "format": (FORMAT if token_weights is None else FORMAT_4).decode(),
        "n_examples": num_rows,
        "sequence_length": sequence_length,
        "row_stride": row_stride,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "num_sources": documents.num_sources,
    }
    if problem := contradiction(header, len(tokens), documents):
        raise ValueError(f"{path.name}: {problem[0]}: {problem[1]}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"{path.name}: token ids {tokens.min()}..{tokens.max()} do not fit a vocabulary of {vocab_size}"
        )
    data = np.ascontiguousarray(tokens, dtype=token_dtype(vocab_size))
    planes = _planes(path, len(data), loss_mask, token_weights)
    arrays = (
        documents.end,
        documents.id,
        documents.source,
        documents.file,
        documents.record,
        _block_digests(data, list(planes.values())),
    )
    tables = {
        name: np.ascontiguousarray(array, dtype)
        for (name, (dtype, _)), array in zip(TABLES.items(), arrays, strict=True)
    }
    if documents.fim is not None:
        tables[FIM] = np.ascontiguousarray(np.column_stack([documents.fim.mode, documents.fim.split]), dtype="<i4")
    header["digest"] = shard_digest(header, tables, LOSS_MASK in planes)
    image = _hdf5_image(header, {"data": data, **tables, **planes})
    with os_errors_as(DataError, f"{path}: the shard cannot be written", "make room, or choose another folder"):
        fsops.write_bytes(path, image)
    return ShardInfo(len(image), hashlib.sha256(image).hexdigest(), header["digest"], num_rows)


def _planes(
    path: Path, length: int, loss_mask: np.ndarray | None, token_weights: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The planes as they are stored, in the digest's order. Raises ValueError."""
    planes: dict[str, np.ndarray] = {}
    if loss_mask is not None:
        planes[LOSS_MASK] = np.ascontiguousarray(loss_mask, dtype=np.uint8)
        if planes[LOSS_MASK].shape != (length,) or planes[LOSS_MASK].max() > 1:
            raise ValueError(f"{path.name}: loss_mask must be [{length}] of 0 and 1")
    if token_weights is not None:
        if token_weights.shape != (length,):
            raise ValueError(f"{path.name}: token_weights must be [{length}]")
        bears: Any = True if loss_mask is None else planes[LOSS_MASK] == 1
        with np.errstate(over="ignore"):  # an infinity is refused below
            planes[TOKEN_WEIGHTS] = np.where(bears, token_weights, 0.0).astype("<f4")
        if problem := weights_problem(planes[TOKEN_WEIGHTS], planes.get(LOSS_MASK)):
            raise ValueError(f"{path.name}: token_weights: {problem}")
    return planes


def weights_problem(weights: np.ndarray, mask: np.ndarray | None) -> str | None:
    """What is wrong with weights of tokens, float32 [n], beside their loss mask; None: nothing."""
    low, high = np.float32(LEAST_WEIGHT), np.float32(MOST_WEIGHT)
    bears = np.ones(len(weights), bool) if mask is None else mask != 0
    as_many = np.count_nonzero(weights) == np.count_nonzero(bears)
    if as_many and ((weights >= low) == bears).all() and weights.max(initial=0) <= high:
        return None  # in five passes without a copy; below it is said what is wrong
    if (weights[~bears] != 0).any():
        return "a token that bears no loss has a weight other than 0"
    if not ((weights[bears] >= low) & (weights[bears] <= high)).all():
        return f"the weight of a token that bears loss lies outside {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
    return None


def _hdf5_image(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> memoryview:
    """The file's bytes, built in memory, so that writing is atomic and its errors are the operating system's own."""
    image = io.BytesIO()  # takes the file's size once; HDF5's own in-memory driver takes it three times
    with h5py.File(image, "w", libver="latest", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
        for name, value in header.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
    return image.getbuffer()


def _block_digests(data: np.ndarray, planes: Sequence[np.ndarray]) -> np.ndarray:
    step = BLOCK_BYTES // data.itemsize
    digests = [
        block_digest(data[at : at + step], [plane[at : at + step] for plane in planes])
        for at in range(0, len(data), step)
    ]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def block_digest(data: np.ndarray, planes: Sequence[np.ndarray]) -> bytes:
    """SHA-256 of a block of tokens and of its part of each plane that the shard has, in the order of PLANES."""
    digest = hashlib.sha256(data.data)
    for plane in planes:
        digest.update(plane.data)
    return digest.digest()


def shard_digest(header: dict[str, Any], tables: dict[str, np.ndarray], has_mask: bool) -> str:
    """SHA-256 over the attributes and each table, lengths first; through `block_digest` it commits to the tokens and
    their planes, and through the attribute `format` to whether there are weights.
    """
    fields = {name: value for name, value in header.items() if name != "digest"}
    names = [name for name in (*TABLES, FIM) if name in tables]
    shapes = {name: list(tables[name].shape) for name in names}
    digest = hashlib.sha256(canonical_json({"attributes": fields, "tables": shapes, "loss_mask": has_mask}))
    for name in names:
        digest.update(np.ascontiguousarray(tables[name]).data)
    return digest.hexdigest()


def contradiction(header: dict[str, Any], length: int, documents: Documents) -> tuple[str, str] | None:
    """The first (field, problem) between attributes, length and documents, or None."""
    rows, sequence_length, stride = header["n_examples"], header["sequence_length"], header["row_stride"]
    if sequence_length < 1 or stride not in (sequence_length, sequence_length + 1):
        return "row_stride", f"{stride} is neither sequence_length ({sequence_length}) nor one more"
    if not 1 <= header["vocab_size"] <= 1 << 31:
        return "vocab_size", f"{header['vocab_size']} lies outside 1..2^31"
    if rows < 1 or num_tokens(rows, sequence_length, stride) != length:
        rows_of = f"{rows} rows of {sequence_length} + 1 tokens at stride {stride}"
        return "n_examples", f"{rows_of} are not the {length} tokens of 'data'"
    end, source = documents.end, documents.source
    columns = (source, documents.file, documents.record)
    if (
        end.ndim != 1
        or documents.id.shape != (len(end), ID_BYTES)
        or any(column.shape != (len(end),) for column in columns)
    ):
        shapes = [array.shape for array in (end, documents.id, *columns)]
        names = ", ".join(list(TABLES)[:5])
        return "doc_end", f"{names} have shapes {shapes}, not [n], [n, 16], [n], [n], [n]"
    if len(end) == 0 or end[0] < 1 or end[-1] != length or np.any(np.diff(end) < 1):
        return "doc_end", f"document ends do not rise from 1 to {length}"
    if source.min() < -1 or source.max() >= documents.num_sources:
        return "doc_source", f"an index lies outside the {documents.num_sources} sources"
    if documents.file.min() < -1 or documents.record.min() < -1:
        return "doc_file", "a file's or record's number lies below -1"
    if np.any((source < 0) != (documents.file < 0)):
        return "doc_source", "a document has a file and no source, or a source and no file"
    if documents.fim is not None and (problem := _fim_problem(documents.fim, len(end))):
        return FIM, problem
    return None


def _fim_problem(fim: FimRecord, documents: int) -> str | None:
    if fim.mode.shape != (documents,) or fim.split.shape != (documents, 2):
        return f"mode and split have shapes {fim.mode.shape}, {fim.split.shape}, not [{documents}], [{documents}, 2]"
    first, second = fim.split[:, 0], fim.split[:, 1]
    if fim.mode.min() < 0 or fim.mode.max() > 2:
        return "a mode lies outside 0..2"
    if first.min() < 0 or np.any(second < first):
        return "a document's cuts do not rise from 0"
    return None
