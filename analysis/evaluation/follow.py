"""Follow a series of revisions as they appear: measure each one and audit the series, and remember what is done.

    follower = Follower(open_series, folder, measure, depth="listing", tell=print)
    poll(follower.look, every_seconds=600)

A revision is taken up once it is whole: its files are listed, its headers are read, and the bytes that are fetched have
the hashes of the list. One that is not whole yet, or cannot be reached, is told once and tried again at every look; one
that is whole and cannot be measured is told and tried again when it changes. `follow.json` in the folder says which
revisions are done, by what identifies their bytes, so that a follower that was killed goes on. Memory and that file
grow by some hundred bytes a revision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from weftrain.core.errors import CheckpointError, DataError, RecipeError, RemoteError, file_problem, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_sealed, sealed
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_model import Sha256, StrictModel, validated
from weftrain.exchange.audit.audit import Depth, audit
from weftrain.exchange.audit.findings import Finding
from weftrain.exchange.audit.headers import missing_files
from weftrain.exchange.audit.names import Place, places_of
from weftrain.exchange.audit.reading import Reader
from weftrain.exchange.audit.series import Revision, Series
from weftrain.exchange.audit.steps import in_order

STATE = "follow.json"
_FORMAT, _VERSION = "weftrain-follow", 1
_SAVE_EVERY = 100  # revisions that were only examined; one that was measured is noted at once
_BLOCK_BYTES = 8 << 20
_MAX_INDEX_BYTES = 16 << 20
_INDEX = "model.safetensors.index.json"

Event = Mapping[str, Any]
Measure = Callable[[Series, Revision, Place], Iterable[Event]]  # a mapping for each score


class NotWholeError(RemoteError):
    """A revision that is listed and not all there: its upload may not have ended."""


class _State(StrictModel):
    """follow.json. done: revision -> its mark when it was taken up. told: findings by the hash of what they say."""

    format: Literal["weftrain-follow"]
    version: Literal[1]
    series: str
    done: dict[str, str]
    told: Annotated[tuple[Sha256, ...], Field(strict=False)]
    root: Sha256


class Follower:
    """Looks at a series again and again.

    open_series: the series as it is now, until its block ends. measure: what is measured of a whole revision; a
    CheckpointError or RecipeError is of that revision, a RemoteError or OSError may pass, anything else ends the
    follower. depth: of the audit that follows a look with something new. tell: called with each event, which has an
    `event` of `revision`, `score`, `finding`, `waiting`, `failed` or `gone`. Raises DataError for a state that is of
    another series.
    """

    def __init__(
        self,
        where: str,
        open_series: Callable[[], AbstractContextManager[Series]],
        folder: Path,
        measure: Measure,
        *,
        depth: Depth | None = "listing",
        tell: Callable[[Event], None],
    ) -> None:
        self._where, self._open, self._path = where, open_series, folder / STATE
        self._measure, self._depth, self._tell = measure, depth, tell
        self.done, told = _read_state(self._path, where)
        self._told = set(told)
        self._waiting: dict[str, str] = {}  # revision -> why, as it was told
        self.found = 0  # findings since this follower began

    @property
    def waiting(self) -> int:
        """Revisions that are there and could not be taken up yet."""
        return len(self._waiting)

    def look(self) -> bool:
        """Take up what is new, then audit. Whether the series says that no more will come.

        Raises RemoteError where the series cannot be read at all.
        """
        with self._open() as series:
            ended = series.has_ended()  # before its list: the last revision is there then
            places = places_of(series.refs())
            gone = sorted((self.done.keys() | self._waiting.keys()) - places.keys())
            for name in gone:
                self.done.pop(name, None)
                self._waiting.pop(name, None)
                self._tell({"event": "gone", "revision": name})
            reader, taken, unsaved = Reader(series, deep=False), 0, 0
            for name in in_order(places):
                if (measured := self._taken(series, reader, name, places[name])) is None:
                    continue
                taken, unsaved = taken + 1, unsaved + 1
                if measured or unsaved >= _SAVE_EVERY:
                    self._save()
                    unsaved = 0
            if taken and self._depth is not None:
                self._audit(series, self._depth)
            if taken or gone or not self._path.exists():
                self._save()
            return ended and not self._waiting

    def _taken(self, series: Series, reader: Reader, name: str, place: Place) -> bool | None:
        """Take up one revision: whether something of it was measured, or None where it is done already or must wait."""
        try:
            mark = series.mark(name)
            if self.done.get(name) == mark:
                return None
            revision = series.revision(name)
            findings = list(_examined(reader, revision))
            scores = []
            for score in self._measure(series, revision, place):
                scores.append(score)
        except (CheckpointError, RecipeError) as error:
            self._tell({"event": "failed", "revision": name, "step": place.step, "why": one_line(error)})
            findings, scores = [], []
        except (RemoteError, OSError, ValueError) as error:
            why = file_problem(error) if isinstance(error, OSError) else one_line(error)
            if self._waiting.get(name) != why:
                self._waiting[name] = why
                self._tell({"event": "waiting", "revision": name, "step": place.step, "why": why})
            return None
        else:
            self._tell({"event": "revision", "revision": name, "step": place.step})
        for score in scores:
            self._tell({"event": "score", "revision": name, "step": place.step, **score})
        for finding in findings:
            self._tell_finding(finding)
        self._waiting.pop(name, None)
        self.done[name] = mark
        return bool(scores)

    def _audit(self, series: Series, depth: Depth) -> None:
        for finding in audit(series, depth).findings:
            if finding.kind not in ("vanished", "unread", "incomplete", "bad file"):  # these wait, and are told so
                self._tell_finding(finding)

    def _tell_finding(self, finding: Finding) -> None:
        told = {"kind": finding.kind, "revisions": list(finding.revisions), "evidence": finding.evidence}
        digest = hashlib.sha256(canonical_json([finding.kind, sorted(finding.revisions)])).hexdigest()
        if digest not in self._told:
            self._told.add(digest)
            self.found += 1
            self._tell({"event": "finding", **told})

    def _save(self) -> None:
        told = {"format": _FORMAT, "version": _VERSION, "series": self._where}
        fsops.make_dirs(self._path.parent)
        fsops.write_bytes(self._path, sealed(told | {"done": self.done, "told": sorted(self._told)}))


def _read_state(path: Path, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        state = validated(_State, parse_sealed(read_plain(path, "record"), _FORMAT, (_VERSION,)))
    except FileNotFoundError:
        return {}, ()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {file_problem(error)}: remove it to take up all revisions again") from error
    if state.series != where:
        raise DataError(f"{path}: is of {state.series[:200]}, and {where[:200]} is followed: name another folder")
    return state.done, state.told


def _examined(reader: Reader, revision: Revision) -> Iterator[Finding]:
    """What a revision shows by itself. Raises NotWholeError where it is not all there."""
    if missing := missing_files(revision):
        raise NotWholeError(f"{len(missing)} of its files of weights are not there yet, such as {missing[0][:120]}")
    if not revision.weights:
        raise NotWholeError("its weights are not there yet")
    read = reader(revision)
    if read.problems:
        raise NotWholeError(read.problems[0][1])
    if read.contradictions:
        words = f"{revision.name}: {'; '.join(read.contradictions)}"
        yield Finding("config contradicted", (revision.name,), words, "header")


def fetch(series: Series, revision: Revision, folder: Path) -> None:
    """Write the weights and the config of a revision into a new folder, and check them against the list's hashes.

    Raises NotWholeError where the bytes are not those of the list, CheckpointError for pickled weights, RemoteError.
    """
    if revision.pickled:
        raise CheckpointError(f"{revision.name}: its weights are pickled, and nothing pickled is loaded")
    fsops.make_dirs(folder)
    for file in (*revision.weights, *(() if revision.config is None else (revision.config,))):
        digest = hashlib.sha256()

        def blocks(path: str = file.path, size: int = file.size, digest: Any = digest) -> Iterator[bytes]:
            for start in range(0, size, _BLOCK_BYTES):
                data = series.read(revision, path, start, min(size, start + _BLOCK_BYTES))
                digest.update(data)
                yield data

        fsops.write_blocks(folder / file.path, blocks())
        found = (folder / file.path).stat().st_size
        wrong = file.identity.startswith("sha256:") and file.identity != f"sha256:{digest.hexdigest()}"
        if found != file.size or wrong:
            raise NotWholeError(f"{file.path}: {found:,} bytes came that are not those of its list ({file.size:,})")
    if len(revision.weights) > 1:
        index = series.read(revision, _INDEX, 0, _MAX_INDEX_BYTES)
        fsops.write_bytes(folder / _INDEX, index)
