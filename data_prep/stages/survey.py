"""Between stages 1 and 2, one process sums up all parts and decides how the order stages are cut.

The number of buckets follows from the tokens counted, not from the size of the inputs, which may be compressed. Where
pieces x buckets would mean too many file opens, pieces are merged into runs first.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.dataset import FAILURES, write_inputs
from weftrain.core.formats.dataset_manifest import InputEntry, merkle_root
from weftrain.core.formats.line_table import write_lines
from weftrain.data_prep.growth import index_documents, parents_failures, parents_inputs, parents_sources
from weftrain.data_prep.stages.part_notes import in_blocks, read_failures, read_note
from weftrain.data_prep.stages.pieces import Piece
from weftrain.data_prep.stages.plan import Limits, PrepPlan, clamped, power_of_two
from weftrain.data_prep.stages.table_file import Table, damaged, write_table
from weftrain.data_prep.tokens.packing import split

_SHOWN_FAILURES = 8


def survey(plan: PrepPlan, max_failures: int) -> dict[str, Any]:
    """Write survey.json, inputs.jsonl, the sources' names and the list of pieces. Raises DataError for too many
    failures.

    `inputs`: what the manifest says of inputs.jsonl. `read`: documents. `buckets` and what follows: see `arrangement`.
    """
    failed = check_failures(plan, "parts", max_failures)
    index_documents(plan)
    encoded: Counter[str] = Counter()
    pieces = _PieceList(plan)
    for part, (note, base_file, base) in enumerate(part_notes(plan, "parts")):
        encoded.update(note["encoded"])
        for piece in range(note["pieces"]):
            pieces.add(part, piece, Table(plan.piece_file(part, piece)), base_file, base)
    if not pieces.read:
        raise DataError(f"{plan.inputs.description}: holds no document; name other files")
    found = {
        "num_sources": pieces.write(plan),
        "inputs": _write_inputs(plan),
        "read": pieces.read,
        "failed": failed,
        "reference_documents": encoded["reference"],
        "checked_documents": encoded["checked"],
        "unknown_tokens": encoded["unknown"],
        "cut_conversations": encoded["cut"],
        "divided_conversations": encoded["divided"],
        **{key: encoded[key] for key in ("cut_prompts", "cut_answers", "no_preference")},
        "weighted_documents": encoded["weighted"],
        **arrangement(plan.limits, len(pieces), pieces.num_bytes, as_read=plan.settings.order == "as_read"),
    }
    fsops.write_bytes(plan.survey_file, canonical_json(found) + b"\n")
    return found


def _write_inputs(plan: PrepPlan) -> dict[str, Any]:
    """Write inputs.jsonl: files that were read, then files that were skipped, the parent's first in each group. Returns
    what the manifest says of it.
    """
    num_bytes, skipped = 0, Counter[str]()

    def hashes() -> Iterator[tuple[str, ...]]:
        """The SHA-256 of each file's shares; parts hold files in order."""
        shares = (share for note, _, _ in part_notes(plan, "parts") for share in note["shares"])
        for _, of_file in itertools.groupby(shares, key=operator.itemgetter(0)):
            yield tuple(sha256 for _, _, _, sha256 in of_file)

    def read() -> Iterator[InputEntry]:
        yield from parents_inputs(plan)[0]
        for file, found in zip(plan.inputs.files, hashes(), strict=True):
            yield InputEntry(name=file.name, num_bytes=file.num_bytes, sha256=found)

    def entries() -> Iterator[InputEntry]:
        nonlocal num_bytes
        for entry in read():
            num_bytes += entry.num_bytes
            yield entry
        for entry in parents_inputs(plan)[1]:
            skipped[entry.skipped or ""] += 1
            yield entry
        for one in plan.inputs.skipped:
            skipped[one.reason] += 1
            yield InputEntry(name=one.name, num_bytes=one.num_bytes, skipped=one.reason)

    written = write_inputs(plan.dataset, entries())
    return {
        "sha256": written.sha256,
        "corpus_sha256": merkle_root(sha256 for entry in read() for sha256 in entry.sha256),
        "files": written.count - skipped.total(),
        "num_bytes": num_bytes,
        "skipped": dict(sorted(skipped.items())),
    }


def arrangement(limits: Limits, pieces: int, num_bytes: int, *, as_read: bool) -> dict[str, int]:
    """How documents are ordered: `buckets`, a power of two, or one per piece where documents stay as read.

    `runs`: merges before that, 0 for none, of `run_pieces` pieces into `run_slices` files, a power of two that divides
    `buckets`. Merging groups of about sqrt(pieces) needs about pieces^1.5 file opens instead of pieces^2.
    """
    if as_read:
        return {"buckets": pieces, "runs": 0, "run_pieces": 0, "run_slices": 0}
    buckets = power_of_two(-(-num_bytes // clamped(num_bytes // 64, *limits.bucket_bytes)))
    if pieces * buckets <= limits.file_opens:
        return {"buckets": buckets, "runs": 0, "run_pieces": 0, "run_slices": 0}
    run_pieces = max(2, math.isqrt(pieces))
    runs = -(-pieces // run_pieces)
    run_slices = min(buckets, power_of_two(-(-num_bytes // (runs * limits.bucket_bytes[1]))))
    return {"buckets": buckets, "runs": runs, "run_pieces": run_pieces, "run_slices": run_slices}


class _PieceList:
    """All pieces in reading order: their part, where their records count from, and their sources. Memory: about 50
    bytes per source of a piece, less than the names, of which there may be millions.
    """

    def __init__(self, plan: PrepPlan) -> None:
        self.read = self.num_bytes = 0
        self._inherited = _identities(entry.name for entry in parents_sources(plan))
        self._columns: dict[str, array[int]] = {name: array("q") for name in ("part", "piece", "base_file", "base")}
        self._identities: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._identities)

    def add(self, part: int, piece: int, table: Table, base_file: int, base: int) -> None:
        for name, value in zip(self._columns, (part, piece, base_file, base), strict=True):
            self._columns[name].append(value)
        self._identities.append(_identities(table.note["sources"]))
        self.read += table.note["read"]
        self.num_bytes += table.num_bytes

    def write(self, plan: PrepPlan) -> int:
        """Number the sources by first appearance; write their names and all pieces. Returns the number of sources."""
        numbers = _numbers(np.concatenate([self._inherited, *self._identities]))[len(self._inherited) :]
        ends = np.cumsum([len(identities) for identities in self._identities])

        def names() -> Iterator[str]:
            yield from (entry.name for entry in parents_sources(plan))
            count = len(self._inherited)
            for part, piece, found in zip(
                self._columns["part"], self._columns["piece"], split(numbers, ends), strict=True
            ):
                for name, number in zip(
                    Table(plan.piece_file(part, piece)).note["sources"], found.tolist(), strict=True
                ):
                    if number == count:
                        yield name
                        count += 1

        arrays = {name: np.array(column, np.int64) for name, column in self._columns.items()}
        write_table(plan.pieces_file, arrays | {"source_end": ends.astype(np.int64), "sources": numbers}, {})
        return write_lines(plan.names_file, names()).count


def _identities(names: Iterable[str]) -> np.ndarray:
    """16 bytes of each name's SHA-256, as uint64 [n, 2]."""
    return np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest()[:16] for name in names), "<u8").reshape(-1, 2)


def _numbers(identities: np.ndarray) -> np.ndarray:
    """uint64 [n, 2] -> int32 [n]: equal rows get equal numbers, by first appearance."""
    order = np.lexsort((identities[:, 1], identities[:, 0]))  # stable: of equal names the first one leads
    fresh = np.append(True, (identities[order[1:]] != identities[order[:-1]]).any(axis=1))
    leaders = order[fresh]
    ranks = np.empty(len(leaders), np.int32)
    ranks[np.argsort(leaders)] = np.arange(len(leaders), dtype=np.int32)
    numbers = np.empty(len(identities), np.int32)
    numbers[order] = ranks[np.cumsum(fresh) - 1]
    return numbers


def pieces_of(plan: PrepPlan, first: int, stop: int | None = None) -> list[Piece]:
    """Pieces first..stop-1, or to the last, as the survey listed them. Raises DataError."""
    table = Table(plan.pieces_file)
    stop = table.length("part") if stop is None else min(stop, table.length("part"))
    columns = [table.slice(name, first, stop).tolist() for name in ("part", "piece", "base_file", "base", "source_end")]
    begin = int(table.slice("source_end", first - 1, first)[0]) if first else 0
    pieces = []
    for part, piece, base_file, base, end in zip(*columns, strict=True):
        pieces.append(
            Piece(plan.piece_file(part, piece), functools.partial(table.slice, "sources", begin, end), base_file, base)
        )
        begin = end
    return pieces


def part_notes(plan: PrepPlan, stage: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Each part's note, its first file, and how many records of that file earlier parts hold. stage: 'samples' or
    'parts'.
    """
    last, records = -1, 0
    for part in range(len(plan.parts)):
        note = Table(plan.sample_file(part)).note if stage == "samples" else read_note(plan.part_file(part))
        first = note["shares"][0][0]
        yield note, first, records if first == last else 0
        for file, _, count, _ in note["shares"]:
            last, records = file, (records if file == last else 0) + count


def check_failures(plan: PrepPlan, stage: str, max_failures: int) -> int:
    """Write failures.jsonl and return the number of failures. Raises DataError naming the first if too many."""
    path, shown, count = plan.dataset / FAILURES, [], 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        yield from parents_failures(plan)
        for failure in _placed_failures(plan, stage):
            count += 1
            if count <= _SHOWN_FAILURES:
                shown.append(f"{failure['place']}: {failure['reason']}")
            yield canonical_json(failure) + b"\n"

    if next(_placed_failures(plan, stage), None) is None and next(parents_failures(plan), None) is None:
        return 0
    fsops.write_blocks(path, in_blocks(lines()))
    if count > max_failures:
        more = f"; {count - _SHOWN_FAILURES} more in {path}" if count > _SHOWN_FAILURES else ""
        budget = (
            f"; {count} documents failed, --max-failures allows {max_failures}" if count > 1 or max_failures else ""
        )
        raise DataError(f"{'; '.join(shown)}{more}{budget}")
    return count


def _placed_failures(plan: PrepPlan, stage: str) -> Iterator[dict[str, str]]:
    """All failures with their line in the file."""
    for part, (note, base_file, base) in enumerate(part_notes(plan, stage)):
        if note["failed"]:
            for failure in read_failures(plan.failures_file(stage, part)):
                line = failure.record + (base if failure.file == base_file else 0) + 1
                yield {"place": f"{plan.inputs.files[failure.file].name}:{line}", "reason": failure.reason}


def load_json(path: Path) -> Any:
    """A file that a stage left, cached because every task asks for it. Raises DataError."""
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise damaged(path, error, path.parent) from error


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, modified_ns: int) -> Any:
    return parse_json(path.read_bytes())
