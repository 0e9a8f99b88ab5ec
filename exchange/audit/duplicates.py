"""Which revisions of a series hold the same weights, so that at most one of them is what its name says.

Published series had such revisions, and every measurement of them puts one model at two steps. A hub's list of files
has the hashes; on this machine files are compared by pieces and then hashed (local.py).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from weftrain.exchange.audit.findings import Finding, equal
from weftrain.exchange.audit.local import files_identity
from weftrain.exchange.audit.names import Place
from weftrain.exchange.audit.series import Revision


def duplicate_groups(revisions: Iterable[Revision]) -> dict[str, list[str]]:
    """Identity of weights -> the revisions that have it, where these are several."""
    groups: dict[str, list[str]] = defaultdict(list)
    for revision in revisions:
        if revision.identity:
            groups[revision.identity].append(revision.name)
    return {identity: names for identity, names in groups.items() if len(names) > 1}


def duplicate_findings(ordered: Sequence[Revision], others: Sequence[Revision]) -> Iterator[Finding]:
    """Revisions with the same weights, and files that some but not all of them share. ordered: those with a step.

    others: those without one, such as main, which may repeat one of them.
    """
    alias = {revision.identity: revision.name for revision in others if revision.identity}
    groups = duplicate_groups(ordered)
    last = ordered[-1].name if ordered else ""
    for identity, names in groups.items():
        words = f"{equal(names)}: the same weights ({shown(identity)})"
        if names[-1] == last:
            words += f"; {len(names) - 1:,} of {len(ordered):,} revisions serve the weights of {last}, the last one"
        if identity in alias:
            words += f", which {alias[identity]} has too"
        yield Finding("duplicate", tuple(names), words, "hash")
    yield from _shared_files(ordered, groups)


def _shared_files(ordered: Sequence[Revision], groups: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    by_file: dict[str, list[Revision]] = defaultdict(list)
    for revision in ordered:
        for file in {file.identity: file for file in revision.weights}.values():
            if len(revision.weights) > 1 and file.identity:
                by_file[file.identity].append(revision)
    sharing: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for identity, found in by_file.items():
        distinct = {revision.identity for revision in found}
        if len(distinct) > 1 and len(found) < sum(bool(revision.weights) for revision in ordered):
            path = next(file.path for file in found[0].weights if file.identity == identity)
            sharing[tuple(revision.name for revision in found)].append(path)
    for names, paths in sharing.items():
        files = next(len(revision.weights) for revision in ordered if revision.name == names[0])
        words = f"{equal(names)}: {len(paths)} of {files} files of weights are the same ({paths[0][:80]})"
        yield Finding("near duplicate", names, words, "hash")


def alias_of(other: Revision, ordered: Sequence[Revision], places: Mapping[str, Place]) -> str:
    """What a revision without a step, such as main, is by its hash: a step's, or one of its own."""
    if not other.weights:
        return "no weights"
    same = [revision.name for revision in ordered if other.identity and revision.identity == other.identity]
    if not same:
        return "weights that no step has" if other.identity else "weights without a known hash"
    return f"the weights of {equal(same)}"


def repeated(revisions: Mapping[str, Sequence[Path]]) -> list[tuple[tuple[str, ...], str]]:
    """Groups of revisions whose files are equal, byte for byte, with the SHA-256 over their hashes. revisions: name ->
    files of weights.

    Raises OSError.
    """
    same: dict[str, list[str]] = defaultdict(list)
    for name, identity in files_identity(revisions).items():
        same[identity].append(name)
    return [(tuple(names), _sha256(identity)) for identity, names in same.items() if len(names) > 1]


def told(groups: Iterable[tuple[tuple[str, ...], str]]) -> str:
    """The groups as words."""
    return "; ".join(f"{equal(names, most=8)} (sha256 {sha256[:12]})" for names, sha256 in groups)


def _sha256(identity: str) -> str:
    """One hash of a revision's: that of its only file, or over the hashes of several."""
    hashes = identity.replace("sha256:", "").split()
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def shown(identity: str) -> str:
    """An identity in words."""
    kind = "git blob" if identity.startswith("git:") else "sha256"
    return f"{kind} {_sha256(identity).removeprefix('git:')[:12]}"
