"""Draws docs/architecture.svg: the packages of weftrain, who imports whom, and about how many lines each has.

    python docs/draw_architecture.py

Every box and arrow comes from the import statements. A box stands above everything it imports, so a circle cannot be
drawn: it is an error. A package names what it imports; an arrow that follows from others is left out. A test draws the
picture again and compares.
"""

from __future__ import annotations

import ast
import html
import textwrap
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("architecture.svg")
OPENED = ("backends", "core")  # packages whose parts are shown
ENTERED = ("core",)  # of these, those where arrows from outside lead to the part that is imported

WIDTH, MARGIN, GAP, PADDING = 1040, 14, 14, 12
ROW_GAP, INNER_ROW_GAP = 40, 26
TITLE_PX, LINE_PX = 18, 15
TITLE_CHARACTER_PX, CHARACTER_PX = 8.6, 6.0
ARROW_SPACING = 7
COLOURS = {  # package -> light and dark mode
    "cli": ("#57606a", "#9aa4ae"),
    "analysis": ("#8250df", "#b392f0"),
    "backends": ("#0969da", "#58a6ff"),
    "data_prep": ("#1a7f37", "#4ac26b"),
    "exchange": ("#bc4c00", "#f0883e"),
    "core": ("#cf222e", "#ff7b72"),
    "kernels": ("#57606a", "#9aa4ae"),
}
CAPTIONS = {
    "cli": "a file for each verb; puts everything together",
    "analysis": "benchmarks, evaluation, memorization, comparisons, reports; is handed a backend and imports none",
    "backends": "each drives its own training steps; the protocol is core/backend.py",
    "backends/local.py": "one process, one device: the specification",
    "backends/null.py": "computes nothing",
    "backends/cuda": "many processes by torchrun",
    "backends/streaming": "weights from RAM or disk, layer by layer",
    "backends/cerebras": "the vendor's compiler and systems",
    "backends/common": "what several backends share",
    "data_prep": "text and token files to packed, shuffled, hashed shards",
    "exchange": "Hugging Face, Cerebras Model Zoo, releases",
    "core": "the trainer; knows no device and no backend",
    "core/run": "a run's folder: recipe, ledger, metrics",
    "core/order": "which sample is read when",
    "core/formats": "files: shards, datasets, tensors, JSON, YAML; written so that nothing is lost, read without trust",
    "kernels": "an op is a reference and its implementations; imports nothing of weftrain",
}
LEGEND = (
    "An arrow means: imports. It is left out where it follows from others. A line goes on behind a box.",
    "Lines of code are rounded. Drawn from the import statements by docs/draw_architecture.py.",
)


@dataclass
class Box:
    """A package, a part of one, or some modules. Its place is set by `place`."""

    name: str  # unique: "core", "core/formats", "core/config.py"
    title: str
    files: list[Path]
    inside: list[Box] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)  # names of packages
    level: int = 0  # 0 imports nothing beside it
    left: float = 0
    top: float = 0
    width: float = 0
    height: float = 0

    @property
    def colour(self) -> str:
        return self.name.split("/")[0]

    def title_lines(self) -> list[str]:
        return textwrap.wrap(self.title, self._characters(TITLE_CHARACTER_PX))

    def caption(self) -> list[str]:
        """What it is for, about how long it is and what it imports, in lines that fit the box."""
        width = self._characters(CHARACTER_PX)
        told = f"imports {', '.join(self.imported)}" if self.imported else ""
        size = [] if self.is_wide else [self.size]  # never within a line, so that a new count moves nothing
        return [*textwrap.wrap(CAPTIONS.get(self.name, ""), width), *size, *textwrap.wrap(told, width)]

    @property
    def size(self) -> str:
        """About how many lines of code, which a wide box shows beside its title."""
        return f"{max(1, round(sum(len(path.read_text().splitlines()) for path in self.files) / 100)) * 100:,} lines"

    @property
    def is_wide(self) -> bool:
        return self.width > 300

    def _characters(self, each_px: float) -> int:
        return max(10, int((self.width - 2 * PADDING) / each_px))

    def rows(self) -> list[list[Box]]:
        """The boxes inside, the level that imports the others first."""
        levels = sorted({box.level for box in self.inside}, reverse=True)
        return [[box for box in self.inside if box.level == level] for level in levels]

    def weight(self) -> float:
        """Share of a row's width."""
        return max([1.0 if "/" in self.name else 1.4, *(sum(box.weight() for box in row) for row in self.rows())])


def imports(root: Path) -> dict[Path, set[Path]]:
    """File -> the files of weftrain that it imports, wherever in it the import stands."""
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    known = {_module(root, path): path for path in files}
    found: dict[Path, set[Path]] = {}
    for path in files:
        found[path] = set()
        for name in _imported_names(path):
            parts = name.split(".")
            ends = (known.get(".".join(parts[:length])) for length in range(len(parts), 1, -1))
            found[path] |= {
                target for target in [next((end for end in ends if end is not None), None)] if target is not None
            }
    return found


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("weftrain", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def boxes(root: Path, imported: Mapping[Path, Collection[Path]]) -> list[Box]:
    """A box for each top-level package, those of OPENED with their parts."""
    by_package: dict[str, list[Path]] = {}
    for path in imported:
        by_package.setdefault(path.relative_to(root).parts[0], []).append(path)
    found = [Box(name, f"{name}/", files) for name, files in by_package.items()]
    for box in found:
        if box.name in OPENED:
            box.inside = _parts(root / box.name, box.files, imported)
    return found


def _parts(folder: Path, files: list[Path], imported: Mapping[Path, Collection[Path]]) -> list[Box]:
    """A box for each sub-package and each module. In core/, modules that the same sub-packages import share one."""
    parts: dict[str, Box] = {}
    own = [path for path in files if path.parent == folder and path.name != "__init__.py"]
    for path in files:
        if path.parent != folder:
            name = path.relative_to(folder).parts[0]
            parts.setdefault(name, Box(f"{folder.name}/{name}", f"{name}/", [])).files.append(path)
    importers: dict[Path, frozenset[str]] = {}
    if folder.name in ENTERED:
        for name, part in parts.items():
            for path in _reached(part.files, imported) & set(own):
                importers[path] = importers.get(path, frozenset()) | {name}
    shared: dict[object, list[Path]] = {}
    for path in own:
        shared.setdefault(importers.get(path, frozenset()) if folder.name in ENTERED else path, []).append(path)
    for group in shared.values():
        title = ", ".join(path.name for path in group)
        parts[title] = Box(f"{folder.name}/{title}", title, group)
    return list(parts.values())


def _reached(files: Iterable[Path], imported: Mapping[Path, Collection[Path]]) -> set[Path]:
    found: set[Path] = set()
    left = list(files)
    while left:
        new = set(imported[left.pop()]) - found
        found |= new
        left += new
    return found


def arrows(houses: list[Box], imported: Mapping[Path, Collection[Path]]) -> list[tuple[Box, Box]]:
    """(importer, imported) of boxes, without those that follow from others. Sets each box's level and what it imports.

    Raises ValueError where boxes import each other in a circle.
    """
    outer = {path: box for box in houses for path in box.files}
    inner = {path: part for box in houses for part in box.inside for path in part.files}
    known = {box.name: box for box in [*outer.values(), *inner.values()]}
    below: dict[str, set[str]] = {name: set() for name in known}
    drawn: dict[str, set[str]] = {name: set() for name in known}
    for path, targets in imported.items():
        for target in targets:
            here, there = outer[path], outer[target]
            ends = inner.get(path, here), inner.get(target, there)
            if here is not there:
                below[here.name].add(there.name)
                ends = tuple(
                    part if box.name in ENTERED else box for part, box in zip(ends, (here, there), strict=True)
                )
            elif ends[0] is not ends[1] and here not in ends:
                below[ends[0].name].add(ends[1].name)
            if ends[0] is not ends[1] and not (here is there and here in ends):
                drawn[ends[0].name].add(ends[1].name)
    for name, box in known.items():
        box.level = _level(name, below, ())
        box.imported = sorted(below[name]) if "/" not in name else []
    return [(known[name], known[other]) for name in sorted(drawn) for other in _reduced(name, drawn)]


def _reduced(name: str, graph: Mapping[str, Collection[str]]) -> list[str]:
    """What a node leads to directly and not by way of another."""

    def beyond(node: str) -> set[str]:
        return {far for near in graph[node] for far in (near, *beyond(near))}

    indirect = {far for near in graph[name] for far in beyond(near)}
    return sorted(set(graph[name]) - indirect)


def _level(name: str, sides: Mapping[str, Collection[str]], above: tuple[str, ...]) -> int:
    if name in above:
        raise ValueError(f"a circle of imports: {' -> '.join((*above[above.index(name) :], name))}")
    return max((1 + _level(other, sides, (*above, name)) for other in sorted(sides.get(name, ()))), default=0)


def place(house: Box, left: float, top: float, width: float) -> None:
    """Give a box and everything in it its place and height."""
    house.left, house.top, house.width = left, top, width
    height = PADDING + TITLE_PX * len(house.title_lines()) + LINE_PX * len(house.caption()) + PADDING / 2
    for number, row in enumerate(house.rows()):
        height += INNER_ROW_GAP if number else PADDING
        height += _place_row(row, left + PADDING, top + height, width - 2 * PADDING)
    house.height = height + (PADDING if house.inside else 0)


def _place_row(row: list[Box], left: float, top: float, width: float) -> float:
    """Place boxes side by side. The height of the row, which all of them get."""
    room, total = width - GAP * (len(row) - 1), sum(box.weight() for box in row)
    for box in row:
        place(box, left, top, room * box.weight() / total)
        left += box.width + GAP
    tallest = max(box.height for box in row)
    for box in row:
        box.height = tallest
    return tallest


def routes(pairs: list[tuple[Box, Box]]) -> list[tuple[Box, Box, float, float]]:
    """Each arrow with the x at which it leaves and arrives, the same where one box stands above the other."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for source, target in sorted(pairs, key=lambda pair: (pair[1].top - pair[0].top, pair[0].name, pair[1].name)):
        first, last = source.top + source.height, target.top
        low = max(source.left, target.left) + PADDING
        high = min(source.left + source.width, target.left + target.width) - PADDING
        if low > high:
            start = min(
                max(target.left + target.width / 2, source.left + PADDING), source.left + source.width - PADDING
            )
            end = min(max(start, target.left + PADDING), target.left + target.width - PADDING)
        else:
            start = end = _free_place(low, high, [x for x, above, below in taken if above < last and below > first])
        taken.append((end, first, last))
        found.append((source, target, start, end))
    return found


def _free_place(low: float, high: float, others: list[float]) -> float:
    """The place from low to high that is furthest from the others, or central among those that are far enough."""
    middle = (low + high) / 2
    places = [low + step for step in range(0, int(high - low) + 1, ARROW_SPACING)]
    return min(places, key=lambda x: (-min([60.0, *(abs(x - other) for other in others)]), abs(x - middle), x))


def draw(root: Path = ROOT) -> str:
    """The picture as SVG text."""
    imported = imports(root)
    houses = boxes(root, imported)
    pairs = arrows(houses, imported)
    top = float(MARGIN)
    for row in Box("", "", [], houses).rows():
        top += _place_row(row, MARGIN, top, WIDTH - 2 * MARGIN) + ROW_GAP
    height = top - ROW_GAP + MARGIN + 40
    ways = routes(pairs)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        ' font-family="system-ui, sans-serif">',
        "<title>weftrain: packages and their imports</title>",
        f"<style>{_style()}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height:.0f}"/>',
        *(_rectangle(box) for box in houses if box.inside),
        *(_line(*way) for way in ways),
        *(_rectangle(part) for box in houses for part in box.inside or [box]),
        *(text for box in houses for one in (box, *box.inside) for text in _texts(one)),
        *(
            f'<text class="small" x="{MARGIN}" y="{height - 28 + 15 * number:.0f}">{line}</text>'
            for number, line in enumerate(LEGEND)
        ),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _style() -> str:
    def colours(mode: int) -> str:
        return "".join(f".{name}{{stroke:{pair[mode]};fill:{pair[mode]}}}" for name, pair in COLOURS.items())

    shape = ".box{stroke-width:1.2;fill-opacity:.09}.way{fill:none;stroke-width:1.3}"
    shape += "text{stroke-width:3px;paint-order:stroke}"  # a halo, where a line runs behind it
    sizes = ".title{font-size:15px;font-weight:600}.small{font-size:11.5px}"
    light = f"text{{fill:#1f2328;stroke:#fff}}.ground,.cover{{fill:#fff}}{colours(0)}"
    dark = f"text{{fill:#e6edf3;stroke:#0d1117}}.ground,.cover{{fill:#0d1117}}{colours(1)}"
    return f"{shape}{sizes}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _rectangle(box: Box) -> str:
    place = f'x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6"'
    return f'<rect class="cover" {place}/><rect class="{box.colour} box" {place}/>'


def _line(source: Box, target: Box, start: float, end: float) -> str:
    first, last = source.top + source.height, target.top
    bend = f"V{last - 14:.0f}H{end:.0f}" if start != end else ""
    way = f'<path class="{source.colour} way" d="M{start:.0f} {first:.0f}{bend}V{last - 5:.0f}"/>'
    return f'{way}<path class="{source.colour}" d="M{end:.0f} {last:.0f}l-3.5 -7h7z"/>'


def _texts(box: Box) -> Iterator[str]:
    x, y = box.left + PADDING, box.top + PADDING - 4
    for line in box.title_lines():
        y += TITLE_PX
        yield f'<text class="title" x="{x:.0f}" y="{y:.0f}">{html.escape(line)}</text>'
    if box.is_wide:
        right = box.left + box.width - PADDING
        yield f'<text class="small" x="{right:.0f}" y="{y:.0f}" text-anchor="end">{box.size}</text>'
    for line in box.caption():
        y += LINE_PX
        yield f'<text class="small" x="{x:.0f}" y="{y:.0f}">{html.escape(line)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw())
