"""Some shards of a dataset from its inputs again: the files that they name are read, and of these only the documents
that they name are encoded. Each piece of a document in a shard must be that part of the document, with the shard's loss
mask and weights, and come from the source and the side of the held-out split that it says.

What all shards together say is left to preparing everything (again.py): that no document of the inputs is left out or
comes twice, in which order they are drawn, and how a tokenizer was trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import TOKENIZER, open_sources
from weftrain.core.formats.dataset_manifest import SetName
from weftrain.core.formats.shard_format import LOSS_MASK, TOKEN_WEIGHTS, Documents
from weftrain.core.formats.shard_reader import ShardReader
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.again_inputs import GivenInputs, Place, RecordedDataset, recorded_settings
from weftrain.data_prep.marks import LOSS, MARKS, WEIGHTS
from weftrain.data_prep.pipeline import with_end_token
from weftrain.data_prep.readers.documents import Failure, FileRead, Part
from weftrain.data_prep.readers.shares import read_part
from weftrain.data_prep.stages.order import HELDOUT, Stream, transformed
from weftrain.data_prep.stages.part_notes import FailureList
from weftrain.data_prep.stages.pieces import Piece, gather
from weftrain.data_prep.stages.plan import PrepPlan, Progress, make_plan
from weftrain.data_prep.stages.settings import Settings
from weftrain.data_prep.stages.table_file import Table
from weftrain.data_prep.stages.tokenize import PartWriter
from weftrain.data_prep.tokens.tokenization import EnginesDifferError, TextEncoder, load_encoder

_Shard = tuple[SetName, int]  # a set, and the number of the shard in it


def drawn_shards(there: RecordedDataset, share: float, seed: int) -> list[_Shard]:
    """At least one shard, sorted; a function of the numbers of shards, the share and the seed. Raises DataError."""
    if not 0 < share <= 1:
        raise DataError(f"--sample {share:g}: give a share of the shards, above 0 and up to 1")
    known: list[_Shard] = [
        (name, index) for name, entry in there.manifest.sets.items() for index in range(len(entry.shards))
    ]
    places = random.Random(seed).sample(range(len(known)), max(1, math.ceil(share * len(known))))
    return [known[place] for place in sorted(places)]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document's part of a shard: ids first..stop-1, and its number in the shard's tables; of a row that was packed
    elsewhere the whole row.
    """

    shard: int
    document: int
    first: int
    stop: int


@dataclass
class _Drawn:
    """A drawn shard. epoch: which of a training set's epochs its rows are of. padding: ids first..stop-1 that are of no
    document. seen: where its entries begin that were compared.
    """

    set_name: SetName
    file: str
    reader: ShardReader
    table: Documents
    epoch: int
    entries: list[_Entry] = field(default_factory=list)
    padding: list[tuple[int, int]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


def check_shards(
    there: RecordedDataset, given: GivenInputs, chosen: Sequence[_Shard], work: Path, progress: Progress
) -> tuple[int, int]:
    """Encode the documents of these shards again, and compare; the numbers of files and documents that were read.
    Raises DataError for the first difference, naming file, row and shard.
    """
    told = recorded_settings(there)
    if told["fim"] is not None and told["fim"].mode != "exact":
        raise DataError(
            f"{there.folder}: fill-in-the-middle was made in its rows after they were packed, so no shard follows from "
            "its own documents: leave --sample out"
        )
    plans = _plans(there, given, told, work, "auto")
    check = _Check(there, chosen, fixed=plans[0].fixed_rows)
    try:
        return check.documents(plans, progress)
    except EnginesDifferError:
        return check.documents(_plans(there, given, told, work / "reference", "tokenizers"), progress)


def _plans(
    there: RecordedDataset, given: GivenInputs, told: Mapping[str, Any], work: Path, engine: str
) -> list[PrepPlan]:
    """A plan for each time that the dataset grew: files were cut into shares, and hashed, by what was read at once."""
    records = told["conversations"] is not None or told["preferences"] is not None
    manifest = there.manifest
    kept: dict[str, Any] = {
        **{key: told[key] for key in ("heldout_fraction", "rows_per_shard", "seed", "packing", "fim", "fim_tokens")},
        **{key: told.get(key) for key in ("eos", "bos", "conversations", "preferences")},
    }
    settings = Settings(
        tokenizer=manifest.tokenizer_sha256,
        tokenizer_vocab_size=None,
        sequence_length=manifest.sequence_length,
        order="as_read",  # which leaves documents where they lie; the recorded order is that of the shards
        **kept,
    )
    encoder = load_encoder(there.folder / TOKENIZER, settings.markers, engine="tokenizers" if records else engine)
    plans = []
    for number, files in enumerate(there.generations()):
        folder = work / str(number)
        inputs = with_end_token(given.of(files), encoder)
        plan = make_plan(folder, inputs, settings, "tokenizers" if records else engine)
        for place in ("parts", "dataset"):
            fsops.make_dirs(folder / place)
        fsops.write_bytes(plan.tokenizer_file, encoder.data)
        plans.append(plan)
    return plans


def _drawn(there: RecordedDataset, number: int, set_name: SetName, index: int, *, fixed: bool) -> _Drawn:
    entry = there.manifest.sets[set_name]
    reader = ShardSet(there.folder, there.manifest, set_name).reader(index)
    first_row = sum(shard.n_examples for shard in entry.shards[:index])
    epoch = int(np.searchsorted(np.cumsum(entry.epochs), first_row, side="right"))
    table = reader.documents()
    found = _Drawn(set_name, entry.shards[index].file, reader, table, epoch)
    starts = np.concatenate([[0], table.end[:-1]]).astype(np.int64)
    spans = list(zip(starts.tolist(), table.end.tolist(), strict=True))
    real = np.append(np.flatnonzero(table.file >= 0), len(spans))
    if fixed:
        width = there.manifest.sequence_length + 1
        for row in range(reader.num_rows):
            first, stop = row * width, (row + 1) * width
            at = int(real[np.searchsorted(real, np.searchsorted(table.end, first, side="right"))])
            if at < len(spans) and spans[at][0] < stop:
                found.entries.append(_Entry(number, at, first, stop))
            else:
                found.padding.append((first, stop))
    else:
        found.entries += [_Entry(number, at, *spans[at]) for at in real[:-1].tolist()]
        found.padding += [spans[at] for at in np.flatnonzero(table.file < 0).tolist()]
    return found


class _Check:
    """Reads the documents of the drawn shards, and compares each with what the shards hold of it."""

    def __init__(self, there: RecordedDataset, chosen: Sequence[_Shard], *, fixed: bool) -> None:
        self._there, self._fixed = there, fixed
        self._drawn = [_drawn(there, number, *one, fixed=fixed) for number, one in enumerate(chosen)]
        self._sources = [entry.name for entry in open_sources(there.folder, there.manifest)]
        self._names = [entry.name for entry in there.entries()]
        self._wanted: dict[Place, list[_Entry]] = {}
        for one in self._drawn:
            for entry in one.entries:
                place = int(one.table.file[entry.document]), int(one.table.record[entry.document])
                self._wanted.setdefault(place, []).append(entry)

    def documents(self, plans: Sequence[PrepPlan], progress: Progress) -> tuple[int, int]:
        """Read, encode and compare them; the numbers of files and documents. Raises DataError."""
        self._check_padding()
        changed: list[int] = []
        for plan, files in zip(plans, self._there.generations(), strict=True):
            changed += self._read(plan, files.start, progress)
        for plan, files in zip(plans, self._there.generations(), strict=True):
            for part in range(len(plan.parts)):
                for piece in _pieces(plan, part):
                    self._compare(plan, piece, files.start, changed)
        self._check_seen(changed)
        if changed:
            raise DataError(
                f"{self._there.other_file(changed)}, and the shards' documents are in it: give the file itself"
            )
        return len({file for file, _ in self._wanted}), len(self._wanted)

    def _read(self, plan: PrepPlan, first_file: int, progress: Progress) -> list[int]:
        """Write pieces of the wanted documents; the files that have another hash than the dataset says."""
        files = {file - first_file for file, _ in self._wanted}
        hashes: dict[int, list[str]] = {}
        records: dict[int, int] = {}
        total = sum(file.num_bytes for file in plan.inputs.files)
        done = 0
        for index, part in enumerate(plan.parts):
            shares = tuple(share for share in part.shares if share.file in files)
            with FailureList(plan.failures_file("parts", index)) as failures:
                writer = PartWriter(plan, index, failures)
                for item in read_part(plan.inputs.files, Part(shares, part.num_bytes), plan.inputs.options):
                    if isinstance(item, FileRead):
                        file = item.share.file
                        hashes.setdefault(file, []).append(item.sha256)
                        records[file] = records.get(file, 0) + item.records
                        continue
                    record = item.record + records.get(item.file, 0)
                    if not isinstance(item, Failure) and (item.file + first_file, record) in self._wanted:
                        writer.add(item, record)
                        writer.write_full()
                    del item  # memory may hold a text only once
                writer.finish()
            done += part.num_bytes
            progress("read", done, total, "bytes")
        entries = self._there.entries()
        return sorted(
            file + first_file for file, found in hashes.items() if tuple(found) != entries[file + first_file].sha256
        )

    def _compare(self, plan: PrepPlan, piece: Piece, first_file: int, changed: Sequence[int]) -> None:
        """Compare the documents of a piece with every place that the shards have them in. Raises DataError."""
        encoder = _encoder(plan)
        gathered = gather([piece], 0, 1, as_read=True)
        names = Table(piece.path).note["sources"]
        every = np.arange(len(gathered.rows))
        for epoch in sorted({one.epoch for one in self._drawn}):
            stream = transformed(plan, gathered, every, epoch, encoder)
            starts = np.concatenate([[0], stream.end[:-1]]).astype(np.int64)
            for at in every.tolist():
                place = int(stream.file[at]) + first_file, int(stream.record[at])
                made = _Made(stream, at, int(starts[at]), names[stream.source[at]], bool(gathered.rows["heldout"][at]))
                for entry in self._wanted[place]:
                    one = self._drawn[entry.shard]
                    same = self._fixed or one.table.id[entry.document].tobytes() == stream.id[at].tobytes()
                    if one.epoch == epoch and same:
                        if problem := self._problem(one, entry, made):
                            raise DataError(self._words(one, entry, problem, changed))
                        one.seen.add(entry.first)

    def _problem(self, one: _Drawn, entry: _Entry, made: _Made) -> str | None:
        """What a shard says of a document that does not follow from it."""
        ids = one.reader.tokens(entry.first, entry.stop)
        begin = self._begin(one, entry, made, ids)
        if begin is None:
            return f"{len(ids):,} ids are not those of the text"
        at = slice(made.start + begin, made.start + begin + len(ids))
        marks, weights = (made.stream.planes.get(name) for name in (MARKS, WEIGHTS))
        loss = np.ones(len(ids), bool) if marks is None else (marks[at] & LOSS) == LOSS
        if weights is not None:
            loss &= weights[at] > 0
        mask, told_weights = (
            one.reader.plane_of_tokens(name, entry.first, entry.stop) for name in (LOSS_MASK, TOKEN_WEIGHTS)
        )
        if not np.array_equal(loss, mask):
            return "the loss mask is not that of its record"
        expected = np.ones(len(ids), np.float32) if weights is None else weights[at]
        if not np.array_equal(expected[loss], told_weights[loss]):
            return "the weights of its tokens are not those of its record"
        if self._sources[int(one.table.source[entry.document])] != made.source:
            return f"its source is {made.source[:80]!r}"
        if made.heldout != (one.set_name == HELDOUT):
            return "it belongs to the other side of the held-out split"
        fim = one.table.fim
        if fim is not None and made.stream.fim is not None:
            told = [int(fim.mode[entry.document]), *fim.split[entry.document].tolist()]
            if told != made.stream.fim[made.at].tolist():
                return "its fill-in-the-middle is not that of the seed"
        return None

    def _begin(self, one: _Drawn, entry: _Entry, made: _Made, ids: np.ndarray) -> int | None:
        """Where in its document a shard's piece begins; None: it is no piece that the shard can hold."""
        whole = made.stream.tokens[made.start : int(made.stream.end[made.at])]
        width = self._there.manifest.sequence_length + 1
        rest = len(whole) - len(ids)
        if rest < 0:
            return None
        if self._fixed or rest == 0:
            candidates: Sequence[int] = (0,) if rest == 0 else ()
        elif self._there.manifest.packing != "concatenate":  # cut into full rows and a rest
            candidates = range(0, len(whole), width) if len(ids) == width else (len(whole) // width * width,)
        else:  # only the shard's first and last documents may be cut
            is_first, is_last = entry.first == 0, entry.document == len(one.table.end) - 1
            candidates = range(rest + 1) if is_first and is_last else (rest,) if is_first else (0,) if is_last else ()
        return next((at for at in candidates if np.array_equal(whole[at : at + len(ids)], ids)), None)

    def _check_padding(self) -> None:
        """Raises DataError for ids that are said to be of no document, and bear loss."""
        for one in self._drawn:
            for first, stop in one.padding:
                if one.reader.plane_of_tokens(LOSS_MASK, first, stop).any():
                    raise DataError(
                        f"{self._there.folder / one.file}: does not follow from its inputs (row "
                        f"{first // one.reader.row_stride}): what it calls padding bears loss: it was altered"
                    )

    def _check_seen(self, changed: Sequence[int]) -> None:
        """Raises DataError for a document of the shards that is in no file."""
        for one in self._drawn:
            for entry in one.entries:
                if entry.first not in one.seen:
                    raise DataError(self._words(one, entry, "it is not in it", changed))

    def _words(self, one: _Drawn, entry: _Entry, problem: str, changed: Sequence[int]) -> str:
        file, record = int(one.table.file[entry.document]), int(one.table.record[entry.document])
        row = entry.first // one.reader.row_stride
        name = self._names[file] if 0 <= file < len(self._names) else f"no input, which it calls {file}"
        place = f"row {row}, of {name}, row {record}"
        if file in changed:
            return (
                f"{self._there.other_file([file])}: {one.file} ({place}): {problem}: give the files that it was made of"
            )
        return f"{self._there.folder / one.file}: does not follow from its inputs ({place}): {problem}: it was altered"


@dataclass(frozen=True)
class _Made:
    """A document that was encoded again: its number `at` in a stream, in which it begins at `start`."""

    stream: Stream
    at: int
    start: int
    source: str
    heldout: bool


def _pieces(plan: PrepPlan, part: int) -> Iterator[Piece]:
    number = 0
    while (path := plan.piece_file(part, number)).exists():
        yield Piece(path)
        number += 1


def _encoder(plan: PrepPlan) -> TextEncoder:
    return load_encoder(plan.tokenizer_file, plan.settings.markers, engine=plan.engine)
