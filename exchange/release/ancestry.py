"""Where a run began that started from a release: which revision of which release, and the chain of releases that leads
to a child.

A child names its parent by the root of that release, by link and by revision, in its ledger and in release.json; its
own first checkpoint is the state that it began with. `walk` checks this against the parents that are given. A parent
that nobody gives is absent: then the child's first state is taken on trust, and the table of claims says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import ReleaseError
from weftrain.core.formats.checkpoint_manifest import folder_name, read_checkpoint_manifest
from weftrain.core.run.ledger_schema import ParentRelease
from weftrain.core.run.lineage import Lineage
from weftrain.core.run.run_folder import LOCK
from weftrain.core.run.starting_checkpoint import OpenedPlace
from weftrain.exchange.release.claims import BEGINNING, Claim
from weftrain.exchange.release.release import RELEASE, Release, read_release, revisions

MAX_GENERATIONS = 1000


def step_of(release: Release, root: str) -> int:
    """Completed steps of the checkpoint of a revision."""
    steps = {link.end: link.stop_step for link in release.links} | {
        link.start: link.first_step for link in release.links
    }
    return steps[root]


def named_revision(folder: Path, release: Release, name: str | None) -> str:
    """The root of the checkpoint that the revision `name` has, or of the last one. Raises ReleaseError."""
    known = dict(revisions(release))
    if name is None:
        return list(known.values())[-1]
    if name not in known:
        raise ReleaseError(f"{folder}: has no revision {name[:80]}: it has {next(iter(known))} to {list(known)[-1]}")
    return known[name]


def parent_release(folder: Path, release: Release, root: str) -> ParentRelease:
    """How a run that begins from the checkpoint `root` names the release. Raises ReleaseError where it is not one of
    its links.
    """
    names = {of: name for name, of in revisions(release)}
    if root not in names:
        raise ReleaseError(
            f"{folder}: its checkpoint {root[:12]} is on no link of {RELEASE}: one was altered; fetch the release again"
        )
    link = next((link.link for link in release.links if link.end == root), None)
    return ParentRelease(
        release=release.root, name=release.name, revision=names[root], link=link, step=step_of(release, root)
    )


def opened_place(folder: Path, named: StartFrom) -> OpenedPlace:
    """What start_from names in a folder, which may be a release: its last revision, or the one that is named.

    Raises ReleaseError for a revision that is not there.
    """
    if not (folder / RELEASE).exists() or (folder / LOCK).exists():  # a run may have been made by copying a release
        if named.revision is not None:
            raise ReleaseError(f"start_from: {folder}: has no {RELEASE}, so no revision {named.revision}: name a step")
        return OpenedPlace(folder, named.step)
    release = read_release(folder)
    step = named.step
    if step is None:
        step = step_of(release, named_revision(folder, release, named.revision))
    return OpenedPlace(folder, step, lambda root: parent_release(folder, release, root).model_dump(mode="json"))


def check_parent(folder: Path, release: Release, line: Lineage) -> Iterator[Claim]:
    """What a child's own files say of its beginning: release.json and ledger alike. Raises ReleaseError."""
    first = line.segments[0]
    told = None if release.parent is None else release.parent.model_dump(mode="json")
    if told != first.parent_release:
        raise ReleaseError(f"{folder / RELEASE}: the parent that it names is not the ledger's: one was altered")
    if first.parent is None:
        return
    if release.parent is None:
        where = f"the checkpoint or weights {first.parent[:12]}, which are not here and of no release that is named"
        yield Claim(BEGINNING, "not covered", where)
        return
    named = f"revision {release.parent.revision} of the release {release.parent.name} ({release.parent.release[:12]})"
    if release.parent.step != first.first_step and _counts_on(first.recipe):
        raise ReleaseError(
            f"{folder / RELEASE}: begins at step {first.first_step}, and its parent's revision is of step "
            f"{release.parent.step}: one was altered"
        )
    yield Claim(BEGINNING, "not covered", f"{named}: give it to `verify --lineage --parent` to compare")


def _counts_on(recipe: Mapping[str, Any]) -> bool:
    start = Recipe.from_record(recipe).start_from
    return start is not None and start.steps == "continue"


@dataclass(frozen=True)
class Generation:
    """A release on the chain from a child to its first ancestor, or what is known of one that is absent.

    where: None for an absent one. compared: tensors of the child's first state that are the revision's.
    """

    parent: ParentRelease
    where: Path | None
    compared: int = 0

    @property
    def status(self) -> Literal["verified", "absent"]:
        return "absent" if self.where is None else "verified"


Verify = Callable[[Path], tuple[Release, Lineage]]  # of a whole release; raises ReleaseError


def walk(child: Path, release: Release, line: Lineage, given: Sequence[Path], verify: Verify) -> list[Generation]:
    """The ancestors of a verified release, the nearest first, as far as they are given; the last may be absent.

    given: folders of releases, in any order. Raises ReleaseError for a parent that is not whole, that has no such
    revision or another state there, and for one that no child on the chain names.
    """
    known = {read_release(folder).root: folder for folder in given}
    found: list[Generation] = []
    while release.parent is not None and len(found) < MAX_GENERATIONS:
        named = release.parent
        place = known.pop(named.release, None)
        if place is None:
            found.append(Generation(named, None))
            break
        parent, parents_line = verify(place)
        _check_named(child, named, place, parent)
        found.append(Generation(named, place, _compare(child, line, place, named)))
        child, release, line = place, parent, parents_line
    if known:
        root, place = next(iter(known.items()))
        wanted = release.parent
        named_root = "none" if wanted is None else f"the release {wanted.name} with the root {wanted.release[:12]}"
        raise ReleaseError(
            f"{place}: its root is {root[:12]}, and {child} names {named_root} as its parent: give that release, or "
            "leave this one out"
        )
    return found


def _check_named(child: Path, named: ParentRelease, place: Path, parent: Release) -> None:
    root = dict(revisions(parent)).get(named.revision)
    if root is None or parent_release(place, parent, root) != named:
        raise ReleaseError(
            f"{child / RELEASE}: names link {named.link} and revision {named.revision} of step {named.step} of "
            f"{named.name}, and {place} has no such revision: one was altered"
        )


def _compare(child: Path, line: Lineage, place: Path, named: ParentRelease) -> int:
    """Compare the state that a child began with, its first checkpoint, with the revision that it names, tensor by
    tensor. How many there are. Raises ReleaseError.
    """
    theirs = read_checkpoint_manifest(place / "checkpoints" / folder_name(named.step))
    first = line.segments[0]
    if first.parent != theirs["root"]:
        raise ReleaseError(
            f"{child}: began from the checkpoint {str(first.parent)[:12]}, and revision {named.revision} of {place} is "
            f"{theirs['root'][:12]}: one was altered"
        )
    folder = child / "checkpoints" / folder_name(first.first_step)
    if not folder.exists():  # removed by a rule of retention
        return 0
    own = read_checkpoint_manifest(folder)["tensors"]
    start = Recipe.from_record(first.recipe).start_from
    whole = start is not None and start.state == "all"
    names = [name for name in theirs["tensors"] if whole or name.startswith("weights/")]
    grown = (
        set()
        if start is None or not start.grow
        else {name for name in names if _shape(own, name) != _shape(theirs["tensors"], name)}
    )
    for name in names:
        if name not in grown and (name not in own or own[name]["sha256"] != theirs["tensors"][name]["sha256"]):
            raise ReleaseError(
                f"{folder}: tensor '{name}' is not that of revision {named.revision} of {place}, from which the run is "
                "said to begin: one was altered"
            )
    return len(names) - len(grown)


def _shape(tensors: Mapping[str, Any], name: str) -> Any:
    return tensors[name]["shape"] if name in tensors else None


def covered_by_lineage(found: Sequence[Generation]) -> list[Claim]:
    """The claim of a child's beginning, where its parent was given and its first state is there to compare."""
    if not found or not found[0].compared:
        return []
    named = found[0].parent
    words = f"{found[0].compared:,} tensors are those of revision {named.revision} of {named.name}"
    return [Claim(BEGINNING, "derivation", words)]
