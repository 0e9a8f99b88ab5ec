"""Shell patterns of paths for every file system: `*`, `?`, `[a-z]`, `[!a-z]`, `**`, `{a,b}`, `{1..9}`.

Hidden names need a pattern that begins with a dot. `**` is any number of folders, none hidden or a link; patterns with
`**` match files only. Each alternative of a brace must match something.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.file_systems import Entry, FileSystem

_MAGIC = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_WORDS = 1_000_000


def is_pattern(path: str) -> bool:
    return _MAGIC.search(path) is not None


def fixed_folder(pattern: str) -> str:
    """What precedes the first component with a wildcard: empty, or ending in `/`."""
    magic = _MAGIC.search(pattern)
    return pattern[: pattern.rfind("/", 0, magic.start() if magic is not None else len(pattern)) + 1]


def matching(system: FileSystem, pattern: str, shown: str) -> list[Entry]:
    """Matching files and folders, each once, by path. shown: the pattern in messages. Raises DataError, OSError."""
    found: dict[str, Entry] = {}
    for word in expand_braces(pattern):
        files_only = "**" in word.split("/")
        matched = [entry for entry in _matching_word(system, word) if not files_only or entry.kind != "folder"]
        if not matched:
            raise DataError(
                f"{shown}: {'matches no file' if word == pattern else f'its alternative {word} matches no file'}"
            )
        found |= {entry.path: entry for entry in matched}
    return [found[path] for path in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """The words that a pattern's braces make, in order. Braces without a comma or a number range are literal."""
    words = _expanded(pattern)
    if len(words) > _MAX_WORDS:
        raise DataError(f"{pattern}: its braces make more than {_MAX_WORDS:,} names; use * instead")
    return words


def _expanded(pattern: str) -> list[str]:
    for begin in (match.start() for match in re.finditer(r"\{", pattern)):
        end, commas = _closing(pattern, begin)
        if end is None:
            continue
        inside = pattern[begin + 1 : end]
        numbers = _RANGE.fullmatch(inside)
        if commas:
            edges = [begin, *commas, end]
            choices = [pattern[left + 1 : right] for left, right in itertools.pairwise(edges)]
        elif numbers is not None:
            low, high = int(numbers[1]), int(numbers[2])
            if abs(high - low) >= _MAX_WORDS:
                raise DataError(f"{pattern}: its braces make more than {_MAX_WORDS:,} names; use * instead")
            width = (
                max(map(len, numbers.groups()))
                if any(digits.startswith("0") and len(digits) > 1 for digits in numbers.groups())
                else 0
            )
            step = 1 if high >= low else -1
            choices = [f"{number:0{width}d}" for number in range(low, high + step, step)]
        else:
            continue
        rest = _expanded(pattern[end + 1 :])
        return [pattern[:begin] + word + after for choice in choices for word in _expanded(choice) for after in rest]
    return [pattern]


def _closing(pattern: str, begin: int) -> tuple[int | None, list[int]]:
    """Where the brace that opens at `begin` closes, and the commas directly inside it."""
    depth, commas = 0, []
    for place in range(begin, len(pattern)):
        if pattern[place] == "{":
            depth += 1
        elif pattern[place] == "," and depth == 1:
            commas.append(place)
        elif pattern[place] == "}":
            depth -= 1
            if not depth:
                return place, commas
    return None, []


def _matching_word(system: FileSystem, word: str) -> Iterator[Entry]:
    if not re.search(r"[*?\[]", word):
        entry = system.look(word)
        if entry is not None:
            yield entry
        return
    root = fixed_folder(word)
    components = [part for part in word[len(root) :].split("/") if part]
    yield from _below(system, root, components, folders_only=word.endswith("/"))


def _below(system: FileSystem, folder: str, components: list[str], folders_only: bool) -> Iterator[Entry]:
    first, *rest = components
    if first == "**":
        yield from _anywhere(system, folder, rest or ["*"], folders_only)
        return
    if not re.search(r"[*?\[]", first):
        entry = system.look(folder + first)
        found = [] if entry is None else [entry]
    else:
        accepts = re.compile(fnmatch.translate(first.replace("[^", "[!"))).match
        hidden = first.startswith(".")
        found = [
            entry
            for entry in _scan(system, folder)
            if (hidden or not entry.name.startswith(".")) and accepts(entry.name)
        ]
    for entry in found:
        if rest:
            if entry.kind == "folder":
                yield from _below(system, f"{folder}{entry.name}/", rest, folders_only)
        elif entry.kind == "folder" or not folders_only:
            yield entry


def _anywhere(system: FileSystem, folder: str, components: list[str], folders_only: bool) -> Iterator[Entry]:
    yield from _below(system, folder, components, folders_only)
    for entry in _scan(system, folder):
        if entry.kind == "folder" and not entry.linked and not entry.name.startswith("."):
            yield from _anywhere(system, f"{folder}{entry.name}/", components, folders_only)


def _scan(system: FileSystem, folder: str) -> Iterator[Entry]:
    try:
        yield from system.scan(folder or ".")
    except (FileNotFoundError, NotADirectoryError):
        return
