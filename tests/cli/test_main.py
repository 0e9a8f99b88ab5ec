"""The verbs, their help and their suggestions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import Result

from weftrain.cli.main import OTHER_WORDS, VERBS, Verbs, main


def verbs() -> list[str]:
    assert isinstance(main, Verbs)
    return main.list_commands(click.Context(main))


def test_verbs_are_frozen(weftrain: Callable[..., Result]) -> None:
    """The list of verbs is part of what users rely on: a change shows here."""
    expected = "prep data recipe show plan train resume launch replica rollback prune defer runs track watch follow report log eval generate chat serve memorize safety timeline "
    expected += (
        "compare figures bench release sign publish verify replay audit openness convert backends kernels gpu lower"
    )
    assert verbs() == expected.split()
    for verb in verbs():
        result = weftrain(verb, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_help_has_one_uncut_line_a_verb(weftrain: Callable[..., Result]) -> None:
    lines = weftrain("--help").output.splitlines()
    for group, members in VERBS.items():
        first = lines.index(f"{group}:") + 1
        for line, (name, verb) in zip(lines[first:], members.items(), strict=False):
            assert line.split(maxsplit=1) == [name, verb.summary]
            assert len(line) <= 78


def test_help_imports_no_verb() -> None:
    """It answers at once: neither torch nor a verb's module is imported."""
    program = (
        "import sys, weftrain.cli.main as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = sorted(n for n in sys.modules if n.startswith('weftrain.cli.') or n in ('torch', 'numpy', 'pydantic'))\n"
        "assert loaded == ['weftrain.cli.display', 'weftrain.cli.main'], loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("trian", "train"), ("tokenize", "prep"), ("status", "runs"), ("bnech", "bench")],
)
def test_a_misspelt_verb_is_answered_with_the_nearest(weftrain: Callable[..., Result], given: str, meant: str) -> None:
    result = weftrain(given, "crystal_demo")
    assert result.exit_code == 2
    assert f"no verb '{given}'; did you mean `weftrain {meant}`?" in result.output


def test_an_unlike_verb_and_other_words(weftrain: Callable[..., Result]) -> None:
    assert "no verb 'xyzzy': `weftrain --help` lists all verbs" in weftrain("xyzzy").output
    assert set(OTHER_WORDS.values()) <= set(verbs())
    assert not set(OTHER_WORDS) & set(verbs())
    assert "no 'chekc'; did you mean 'check'?" in weftrain("kernels", "chekc").output
