"""A size is told in one unit, with enough digits for the smallest; and every message of the product is held to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from weftrain.core.formats.units import gb, gb_done, gib

PRODUCT = ("analysis", "backends", "cli", "core", "data_prep", "exchange", "kernels")
OTHER_UNITS = re.compile(r"\b(?:[kKMT]i?B|Ki?B|[kmt]i?bytes?|(?:kilo|mega|giga|tera|kibi|mebi|gibi)bytes?)\b")

# Files whose messages may name another unit, and why.
EXEMPT = {
    "analysis/machine/devices.py": "quotes the vendors' data sheets, bandwidths of TB/s",
    "cli/kernels.py": "a GPU's shared memory and compiled code, in KiB",
    "cli/kernels_bench.py": "the memory of one call, in MiB",
    "kernels/checks/compile_gate.py": "a GPU's shared memory, in KiB",
    "kernels/triton_ops/_attention_tables.py": "a GPU's shared memory, in KiB",
}
# Files that write GiB or GB behind a number by themselves, and why.
OWN_NUMBERS = {
    "core/formats/units.py": "the one place",
    "kernels/bench/roofline.py": "kernels/ imports nothing of core/",
    "analysis/report/page.py": "values that a chart has scaled",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if OTHER_UNITS.search(text) or re.search(r"\bGi?B\b", text):
                yield str(path.relative_to(ROOT)), ast.parse(text)


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings of a program, without its docstrings. A command's docstring is its help, and counts."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and not any("command" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def other_units(tree: ast.AST) -> list[int]:
    return [node.lineno for node in texts(tree) if OTHER_UNITS.search(node.value)]


def own_numbers(tree: ast.AST) -> list[int]:
    """Lines where a value is followed by ' GiB' or ' GB', which gib() and gb() would have written."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                    found += [after.lineno] if re.match(r" Gi?B\b", str(after.value)) else []
    return found


@pytest.mark.parametrize(
    ("size_bytes", "memory", "file"),
    [
        (0, "0 GiB", "0 GB"),
        (2**30, "1.00 GiB", "1.07 GB"),
        (10**9, "0.931 GiB", "1.00 GB"),
        (5 * 2**40, "5,120.00 GiB", "5,497.56 GB"),
        (2**20, "0.000977 GiB", "0.00105 GB"),
        (1, "0.0000000 GiB", "0.0000000 GB"),
        (2**30 - 1, "1.00 GiB", "1.07 GB"),
    ],
)
def test_sizes(size_bytes: int, memory: str, file: str) -> None:
    assert (gib(size_bytes), gb(size_bytes)) == (memory, file)


def test_progress_has_the_decimals_of_its_total() -> None:
    assert gb_done(3_000_000, 12_000_000) == "0.0030/0.0120 GB"
    assert gb_done(0, 5_000_000_000) == "0.00/5.00 GB"
    assert gb_done(0, 0) == "0/0 GB"


def test_every_message_tells_sizes_in_gib_or_gb() -> None:
    named, numbers = {}, {}
    for path, tree in sources():
        if path not in EXEMPT and (lines := other_units(tree)):
            named[path] = lines
        if path not in OWN_NUMBERS and (lines := own_numbers(tree)):
            numbers[path] = lines
    assert named == {}, "memory is told by units.gib(), disk, files and network by units.gb()"
    assert numbers == {}, "use units.gib() or units.gb()"
    gone = [path for path in (*EXEMPT, *OWN_NUMBERS) if not Path(ROOT, path).is_file()]
    assert not gone


@pytest.mark.parametrize("line", ["f'{x} MiB'", "'needs 30 kB'", "f'{x / 1e6:.1f} MB/s'", "'some megabytes'"])
def test_another_unit_would_be_found(line: str) -> None:
    assert other_units(ast.parse(f"print({line})")) == [1]


def test_a_number_that_units_did_not_write_would_be_found() -> None:
    assert own_numbers(ast.parse("print(f'{x / 2**30:.1f} GiB')")) == [1]
    assert own_numbers(ast.parse("print(f'{gib(x)} of memory')")) == []
