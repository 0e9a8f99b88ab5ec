"""Text from files reaches the terminal as text: no verb prints what would act on it, and no verb reads it as markup."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from places import ROOT
from rich.table import Table
from rich.tree import Tree

from weftrain.cli.display import Bar, Console, plain_output
from weftrain.cli.main import VERBS, Failure, main
from weftrain.core.errors import printable
from weftrain.core.run.ledger import Ledger

CLI = ROOT / "cli"
HOSTILE = "\x1b[2J\x1b]0;title\x07\rhidden\x9b31m\u202eevil\x00[red]x[/] [/nothing] :smile:"
SHOWN = r"\x1b[2J\x1b]0;title\x07\rhidden\x9b31m\u202eevil\x00[red]x[/] [/nothing] :smile:"


def acts(text: str) -> bool:
    """Whether a terminal would do anything for it but show it, and go to the next line."""
    return re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text) is not None


def test_printable() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("täglich 日本語 😀 a\u00a0b\u3000c") == "täglich 日本語 😀 a\u00a0b\u3000c"
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    assert printable("\ud800") == "\\ud800"


def test_all_ways_of_printing(capsys: pytest.CaptureFixture[str]) -> None:
    table, tree = Table(HOSTILE, title=HOSTILE), Tree(HOSTILE)
    table.add_row(HOSTILE)
    tree.add(HOSTILE)
    with plain_output():
        console = Console(width=400, highlight=False)
        for thing in (HOSTILE, table, tree):
            console.print(thing)
        click.echo(HOSTILE)
        click.secho(HOSTILE)
        print(HOSTILE)
        with Bar(console, HOSTILE, 3) as bar:
            bar.say(HOSTILE)
        click.echo(HOSTILE, err=True)
    Failure(HOSTILE, 2).show()
    captured = capsys.readouterr()
    assert not acts(captured.out)
    # where there is no terminal click itself leaves out the first of the sequences:
    assert captured.out.count(SHOWN) == 8
    assert captured.out.count(SHOWN.removeprefix(r"\x1b[2J")) == 10
    assert not acts(captured.err.replace("\rhidden", "", 1))  # bars of libraries need it there


def test_colours_and_bars_of_a_terminal_stay() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200, legacy_windows=False, color_system="standard")
    with plain_output():
        with Bar(console, HOSTILE, 2) as bar:
            bar.update(1, HOSTILE)
            bar.say("said")
        console.print("red", style="red")
    written = stream.getvalue()
    assert "\x1b[31mred\x1b[0m" in written
    assert "\x1b[2J" not in written
    assert "\x1b]0" not in written
    assert "said" in written


def test_a_ledger_and_names_of_files(tmp_path: Path) -> None:
    """log of a run and openness of a folder, as they print in a terminal and in a pipe."""
    run = tmp_path / "run"
    run.mkdir()
    ledger = Ledger(run)
    ledger.add("defer", step=3, chunk=1, action="defer", reason=HOSTILE)
    told = CliRunner().invoke(main, ["log", str(run)])
    assert told.exit_code == 0, told.output
    assert not acts(told.output)
    assert SHOWN in told.output
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    (folder / "model\x1b[2J[red].safetensors").write_bytes(b"")
    told = CliRunner().invoke(main, ["openness", str(folder)])
    assert told.exit_code == 0, told.output
    assert not acts(told.output)


def test_every_verb_prints_by_the_one_console() -> None:
    """rich's own Console would take strings for markup, and write them past plain_output."""
    for path in sorted(CLI.glob("*.py")):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        froms = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if path.name != "display.py":
            assert not {"rich", "rich.console", "rich.markup"} & names, path
            assert not {"rich.print", "rich.console.Console"} & froms, path
            assert not any(name.startswith("rich.markup.") for name in froms), path
    assert VERBS


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_keeps_to_the_width_and_breaks_no_word(width: int) -> None:
    """In a terminal every drawing is one line within the width; what is too long ends in an ellipsis."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, legacy_windows=False, color_system=None)
    with Bar(console, "measuring", 1_000_000) as bar:
        bar.update(123_456, "round 3: 12,345.6 ms, and a note that is longer than the narrow terminal")
    lines = [re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in re.split("[\r\n]", stream.getvalue())]
    drawn = [line for line in lines if line.strip()]
    assert any("measuring" in line and "123456/1000000" in line for line in drawn), drawn
    assert all(len(line) <= width for line in drawn), drawn
    assert all("measuring" in line or not line.strip() for line in drawn), drawn
