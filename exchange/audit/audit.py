"""The audit of a series: is each revision what its name and its config say, and is the series whole?

    found = audit(open_series("hub:owner/name"), deep=False)
    found.findings

Names and lists of files with hashes come first, which needs no download: duplicates, gaps, order, missing files. Then
headers and configs are read: changes of dtype, shape and config, and what a config claims against its tensors. `deep`
reads a piece of a few tensors of each revision as well. A revision that cannot be read is a finding, and the audit goes
on. Memory grows by some hundred bytes a revision.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weftrain.core.errors import ReleaseError, RemoteError
from weftrain.core.formats.units import gb
from weftrain.exchange.audit.claims import changes, config_finding, shape_findings, where_changed
from weftrain.exchange.audit.clone import CloneSeries, is_clone
from weftrain.exchange.audit.duplicates import alias_of, duplicate_findings, duplicate_groups, shown
from weftrain.exchange.audit.findings import Fact, Finding, FoundBy, Kind, equal, named
from weftrain.exchange.audit.headers import missing_files, read_layout
from weftrain.exchange.audit.hub import ENDPOINT, HubSeries, is_hub
from weftrain.exchange.audit.local import CheckpointSeries, FolderSeries, checkpoints_in
from weftrain.exchange.audit.names import Place, places_of
from weftrain.exchange.audit.neighbours import Track, shared_tensors
from weftrain.exchange.audit.reading import Probe, Read, Reader, in_threads, problems_in
from weftrain.exchange.audit.samples import tensor_hash
from weftrain.exchange.audit.series import Revision, Series
from weftrain.exchange.audit.steps import in_order, parts_of, spacing, step_findings

THREADS = 8
_GIVE_UP_AFTER = 24  # revisions of which not one could be read
Depth = Literal["listing", "headers", "deep"]
Progress = Callable[[int, int, str], None]  # done, of how many, what is read


@dataclass(frozen=True)
class Point:
    """A revision as a page draws it. norm, move: of the sample, where one was read."""

    name: str
    part: str
    step: int
    norm: float | None
    move: float | None


@dataclass(frozen=True)
class Audit:
    """series: as the user named it. revisions: those with a step, in order. others: those without."""

    series: str
    kind: str
    depth: Depth
    revisions: tuple[str, ...]
    others: tuple[str, ...]
    facts: tuple[Fact, ...]
    findings: tuple[Finding, ...]
    points: tuple[Point, ...]


def open_series(address: str, endpoint: str = ENDPOINT, token: str | None = None) -> Series:
    """The series at an address: `hub:owner/name`, or a folder. Raises RemoteError, ReleaseError."""
    if is_hub(address):
        return HubSeries(address, endpoint, token)
    folder = Path(address)
    if not folder.is_dir():
        raise ReleaseError(f"{address}: is no folder: name a series' folder, or a repository as hub:owner/name")
    if checkpoints_in(folder):
        return CheckpointSeries(folder)
    if is_clone(folder) and not FolderSeries(folder).refs():
        return CloneSeries(folder)
    return FolderSeries(folder)


def audit(
    series: Series,
    depth: Depth = "headers",
    *,
    threads: int = THREADS,
    progress: Progress = lambda done, total, what: None,
    probe: Probe | None = None,
) -> Audit:
    """Audit a series, which is closed then.

    probe: with depth deep, what is measured of each revision's weights besides what is recorded of it; one after
    another, since it loads a model. Raises RemoteError where the series cannot be read at all, ReleaseError where no
    revision has a step.
    """
    try:
        return _audited(series, depth, threads, progress, probe)
    finally:
        series.close()


def _audited(series: Series, depth: Depth, threads: int, progress: Progress, probe: Probe | None) -> Audit:
    names = series.refs()
    places = places_of(names)
    if not places:
        raise ReleaseError(
            f"{series.where}: holds no revision with a step in its name, such as step1000 or ckpt_001: name a series"
        )
    found: list[Finding] = []
    problems: dict[tuple[Kind, str], list[str]] = defaultdict(list)
    order = in_order(places)
    others = [name for name in names if name not in places]
    listed = _listed(series, [*order, *others], threads, problems, progress)
    ordered = [listed[name] for name in order if name in listed]
    unnumbered = [listed[name] for name in others if name in listed]
    found += step_findings(places)
    found += duplicate_findings(ordered, unnumbered)
    for revision in ordered:
        if missing := missing_files(revision):
            words = f"{named(missing, most=2)} of its files of weights are missing"
            problems["incomplete", words].append(revision.name)
        elif not revision.weights:
            problems["incomplete", "there are no weights"].append(revision.name)
    reads: list[Read] = []
    points: list[Point] = []
    if depth != "listing":
        reader = Reader(series, deep=depth == "deep", probe=probe)
        tracks: dict[str, Track] = defaultdict(Track)
        repeats = {
            name
            for names in duplicate_groups(ordered).values()
            for name in sorted(names, key=lambda name: places[name].step)[:-1]
        }
        for index, read in enumerate(in_threads(reader, ordered, threads), 1):
            progress(index, len(ordered), "headers and configs")
            _taken(read, repeats, places, tracks, problems)
            read.sample = None
            reads.append(read)
        found += _changes(reads, repeats, places, reader)
        found += shared_tensors(reads, reader.shapes.get, lambda *three: _confirmed(series, *three))
        for track in tracks.values():
            found += track.findings()
        points = _points(tracks, order, places)
    for (kind, words), which in problems.items():
        by: FoundBy = "listing" if kind in ("vanished", "unread", "incomplete") else "header"
        found.append(Finding(kind, tuple(which), f"{named(which)}: {words}", by))
    facts = [*_facts(ordered, places, reads, depth), *_other_facts(unnumbered, ordered, places), *_cost(series)]
    rank = {name: index for index, name in enumerate(order)}
    found.sort(key=lambda one: rank.get(one.revisions[0], -1) if one.revisions else -1)
    return Audit(
        series=series.where,
        kind=series.kind,
        depth=depth,
        revisions=tuple(order),
        others=tuple(others),
        facts=tuple(facts),
        findings=tuple(_once(found)),
        points=tuple(points),
    )


def same_weights(series: Series, threads: int = THREADS) -> tuple[int, list[str]]:
    """How many revisions with a step there are, and in words those that hold the same weights, by hashes alone.

    Raises ReleaseError where files cannot be read, RemoteError.
    """
    problems: dict[tuple[Kind, str], list[str]] = defaultdict(list)
    try:
        names = in_order(places_of(series.refs()))
        listed = _listed(series, names, threads, problems, lambda done, total, what: None)
    finally:
        series.close()
    for (_, words), names in problems.items():
        raise ReleaseError(f"{series.where}: {named(names)}: {words}: fetch it again")
    groups = duplicate_groups(revision for revision in listed.values() if revision.weights)
    return sum(bool(revision.weights) for revision in listed.values()), [
        f"{equal(names, most=8)} ({shown(identity)})" for identity, names in groups.items()
    ]


def _listed(
    series: Series,
    names: Sequence[str],
    threads: int,
    problems: dict[tuple[Kind, str], list[str]],
    progress: Progress,
) -> dict[str, Revision]:
    """Name -> revision by its list of files, of those that can be listed."""

    def one(name: str) -> tuple[str, Revision | None, list[tuple[Kind, str]]]:
        own: list[tuple[Kind, str]] = []
        with problems_in(own):
            return name, series.revision(name), own
        return name, None, own

    listed: dict[str, Revision] = {}
    unread = 0
    for index, (name, revision, own) in enumerate(in_threads(one, names, threads), 1):
        progress(index, len(names), "lists of files")
        if revision is not None:
            listed[name] = revision
        for kind, words in own:
            problems[kind, words].append(name)
            unread += kind == "unread"
            if unread >= min(_GIVE_UP_AFTER, len(names)) and not listed:
                raise RemoteError(words)
    settled = series.settled(list(listed.values()))
    return {revision.name: revision for revision in settled}


def _taken(
    read: Read,
    repeats: set[str],
    places: Mapping[str, Place],
    tracks: dict[str, Track],
    problems: dict[tuple[Kind, str], list[str]],
) -> None:
    """Note what one revision shows by itself, and add its sample to the track of its part."""
    name = read.revision.name
    place = places[name]
    for kind, words in read.problems:
        problems[kind, words].append(name)
    if read.contradictions:
        problems["config contradicted", "; ".join(read.contradictions)].append(name)
    if read.told_step is not None and read.told_step != place.step:
        problems["out of order", f"its own state says step {read.told_step:,}"].append(name)
    if read.sample is None:
        return
    if bad := read.sample.not_finite:
        problems["not finite", f"{bad[0][:120]} holds NaN or infinity"].append(name)
    elif read.sample.pieces and name not in repeats:
        tracks[place.part].add(name, place.step, read.sample, read.probe)


def _changes(
    reads: Sequence[Read], repeats: set[str], places: Mapping[str, Place], reader: Reader
) -> Iterator[Finding]:
    """Changes of layout and config in mid-series, within each part of the training. repeats: those revisions whose
    weights are a later one's, and so is their layout.
    """
    by_name = {read.revision.name: read for read in reads}
    for names in parts_of(places).values():
        part = [by_name[name] for name in names if name in by_name]
        own = [read for read in part if read.layout and read.revision.name not in repeats]
        for before, after, back in changes([(read.revision.name, read.layout) for read in own]):
            old, new = reader.shapes.get(before.value), reader.shapes.get(after.value)
            where, words = where_changed(before, after, back)
            if old is None or new is None:
                yield Finding("shape change", where, f"{words}: the tensors are others", "header")
            else:
                yield from shape_findings(old, new, where, words)
        for before, after, back in changes([(read.revision.name, read.config) for read in part if read.config]):
            where, words = where_changed(before, after, back)
            claims, others = reader.claims.get(before.value), reader.claims.get(after.value)
            if claims is None or others is None:
                yield Finding("config change", where, f"{words}: the config is another", "config")
            elif (finding := config_finding(claims, others, where, words)) is not None:
                yield finding


def _confirmed(series: Series, one: Read, other: Read, tensors: list[str]) -> list[str]:
    """Those tensors of two revisions that are equal in every byte: by their hashes, or by reading them."""
    keys, others = series.tensor_keys(one.revision), series.tensor_keys(other.revision)
    if keys and others:
        return [name for name in tensors if keys.get(name) == others.get(name)]
    layout, second = read_layout(series, one.revision), read_layout(series, other.revision)
    if layout is None or second is None:
        return []
    return [
        name
        for name in tensors
        if tensor_hash(series, one.revision, layout, name) == tensor_hash(series, other.revision, second, name)
    ]


def _points(tracks: Mapping[str, Track], order: Sequence[str], places: Mapping[str, Place]) -> list[Point]:
    drawn: dict[str, tuple[float | None, float | None]] = {}
    for track in tracks.values():
        for index, name in enumerate(track.names):
            norms = track.norms[index]
            mean = sum(norms.values()) / len(norms) if norms else None
            drawn[name] = mean, track.moves[index - 1] if index else None
    return [Point(name, places[name].part, places[name].step, *drawn.get(name, (None, None))) for name in order]


def _once(found: Sequence[Finding]) -> Iterator[Finding]:
    """Without what a surer finding says already of the same revisions."""
    surer = {one.revisions for one in found if one.kind == "duplicate"}
    seen = set()
    for one in found:
        if one.kind == "near duplicate" and one.revisions in surer:
            continue
        if (one.kind, one.revisions, one.evidence) not in seen:
            seen.add((one.kind, one.revisions, one.evidence))
            yield one


def _facts(
    ordered: Sequence[Revision], places: Mapping[str, Place], reads: Sequence[Read], depth: Depth
) -> Iterator[Fact]:
    for part, names in parts_of(places).items():
        steps = [places[name].step for name in names]
        usual = spacing(steps)
        words = f"{len(names):,} revisions, {steps[0]:,} to {steps[-1]:,}"
        words += f", mostly {usual:,} apart" if usual else ""
        yield Fact(f"steps of {part}" if part else "steps", "present", words)
    total = len(ordered)
    pickled = [revision.name for revision in ordered if revision.pickled]
    unhashed = sum(not revision.identity for revision in ordered)
    size = sum(file.size for revision in ordered for file in revision.weights)
    words = f"{gb(size)} in {total:,} revisions" + (f"; no hash is known of {unhashed:,}" if unhashed else "")
    if pickled:
        words += f"; pickled in {named(pickled)}, which is never loaded: shapes and dtypes there are not examined"
    yield Fact("weights", "partial" if pickled or unhashed else "present", words)
    for what, count in (
        ("config", sum(revision.config is not None for revision in ordered)),
        ("optimizer state", sum(revision.optimizer for revision in ordered)),
        ("data order", sum(revision.data_order for revision in ordered)),
    ):
        status = "present" if count == total and total else "partial" if count else "absent"
        yield Fact(what, status, f"in {count:,} of {total:,} revisions")
    if depth == "listing":
        yield Fact("headers", "not read", "dtypes, shapes and configs were not examined")
    else:
        counted = Counter(read.layout for read in reads if read.layout)
        layouts = f"{len(counted):,} layout{'' if len(counted) == 1 else 's'} of tensors"
        words = f"of {counted.total():,} of {total:,} revisions, {layouts}"
        yield Fact("headers", "present" if counted.total() == total else "partial", words)


def _other_facts(
    unnumbered: Sequence[Revision], ordered: Sequence[Revision], places: Mapping[str, Place]
) -> Iterator[Fact]:
    for revision in unnumbered[:8]:
        yield Fact(revision.name[:80], "no step", f"has {alias_of(revision, ordered, places)}")
    if len(unnumbered) > 8:
        yield Fact("others", "no step", f"{len(unnumbered) - 8:,} more revisions have no step in their names")


def _cost(series: Series) -> Iterator[Fact]:
    if isinstance(series, HubSeries):
        yield Fact("fetched", "read", f"{gb(series.read_bytes)} in {series.requests:,} requests")
