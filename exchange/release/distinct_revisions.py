"""Which revisions of a series hold the same weights, so that at least one of them is not what its name says.

Published series had such revisions, and every measurement of them puts one model at two steps. All revisions of a
series are equally large, so pieces at a few places are read first, and only files whose pieces agree are read to their
end.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import open_plain

_PIECES, _PIECE_BYTES = 16, 4096


def repeated(revisions: Mapping[str, Sequence[Path]]) -> list[tuple[tuple[str, ...], str]]:
    """Groups of revisions whose files are equal, byte for byte, with the SHA-256 over their hashes. revisions: name ->
    files of weights.

    Raises OSError.
    """
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for name, files in revisions.items():
        alike[tuple(_pieces(path) for path in sorted(files))].append(name)
    same: dict[str, list[str]] = defaultdict(list)
    for names in alike.values():
        for name in names if len(names) > 1 else ():
            hashes = "".join(fsops.sha256_file(path) for path in sorted(revisions[name]))
            same[hashes if len(revisions[name]) == 1 else hashlib.sha256(hashes.encode()).hexdigest()].append(name)
    return [(tuple(names), sha256) for sha256, names in same.items() if len(names) > 1]


def told(groups: Iterable[tuple[tuple[str, ...], str]]) -> str:
    """The groups as words."""
    return "; ".join(f"{' = '.join(names)} (sha256 {sha256[:12]})" for names, sha256 in groups)


def _pieces(path: Path) -> tuple[int, str]:
    """A file's size, and a hash of pieces spread over it."""
    with open_plain(path) as file:
        size = file.seek(0, 2)
        found = hashlib.sha256()
        for number in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * number // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return size, found.hexdigest()
