"""What the command line makes of a reader that leaves, a locale without the characters, misspelt paths, and Ctrl-C."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from places import ROOT

from weftrain.cli import display
from weftrain.cli.main import VERBS, main
from weftrain.core.run.ledger import Ledger

PROGRAM = [sys.executable, "-m", "weftrain.cli"]


@pytest.mark.parametrize("verb", [("show", "amber_7b"), ("--help",), ("show", "--help")])
def test_a_reader_that_leaves_ends_the_verb_without_a_traceback(verb: tuple[str, ...]) -> None:
    """As other tools end by SIGPIPE: 141 in the shell."""
    command = subprocess.Popen([*PROGRAM, *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()  # the verb has not printed yet
    assert command.stderr.read() == b""
    assert command.wait() == 141


@pytest.mark.parametrize("verb", [("show",), ("recipe", "amber_7b"), ("--help",)])
def test_a_locale_without_the_characters_changes_the_characters_alone(verb: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "40"}
    done = subprocess.run([*PROGRAM, *verb], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize("verb", [("--help",), ("recipe", "amber_7b"), ("show",)])
def test_standard_output_is_closed_or_full(verb: tuple[str, ...]) -> None:
    closed = subprocess.run(["sh", "-c", '"$0" "$@" >&-', *PROGRAM, *verb], capture_output=True, text=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *verb], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    said = "weftrain: standard output: No space left on device: free space, or name another place\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_help_breaks_no_word_in_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for verb in ([], ["train"], ["bench", "train"]):
        output = CliRunner().invoke(main, [*verb, "--help"]).output
        assert "--help" in output
        words = {word for line in output.splitlines() for word in re.findall(r"[a-z]{5,}", line)}
        monkeypatch.setenv("COLUMNS", "200")
        wide = CliRunner().invoke(main, [*verb, "--help"]).output
        monkeypatch.setenv("COLUMNS", "40")
        assert words <= set(re.findall(r"[a-z]{5,}", wide)), verb
        assert max(map(len, output.splitlines())) <= 60  # an option's own name may be longer


@pytest.mark.parametrize(
    "changes",
    [
        {"HOME": "/dev/null/home"},  # where nobody can make a folder, root included
        {"HOME": "/nonexistent"},
        {"HOME": None, "USER": None, "LOGNAME": None},
        {"XDG_CACHE_HOME": "/dev/null/cache"},
        {"TERM": "dumb", "COLUMNS": "40"},
        {"LANG": "C", "LC_ALL": "C"},
    ],
    ids=str,
)
def test_verbs_need_no_home_and_no_terminal(
    changes: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Ledger(tmp_path).add("defer", step=3, chunk=1, action="defer", reason="ä")
    for command in (
        "recipe crystal_demo",
        "show crystal_demo",
        "runs",
        "log .",
        "backends",
        "kernels",
        "bench data bench_70m",
    ):
        result = CliRunner().invoke(main, command.split())
        assert (result.exit_code, result.exception, result.stderr) == (0, None, ""), command


def test_a_cache_that_cannot_be_made_is_answered_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    result = CliRunner().invoke(main, ["backends", "setup", "cerebras"])
    assert result.exit_code == 2
    assert "set XDG_CACHE_HOME to a folder that may be written" in result.output


def test_what_an_encoding_lacks_is_shown_as_its_number(tmp_path: Path) -> None:
    program = "import sys; from weftrain.cli.display import plain_output\nwith plain_output(): print('\\u2713 done')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=60)
    assert done.stdout == b"\\u2713 done\n", done.stderr


@pytest.mark.parametrize(
    "verb", ["eval", "generate", "log", "report", "release", "verify", "replay", "openness", "audit"]
)
def test_a_misspelt_run_is_answered_with_its_neighbour(verb: str, tmp_path: Path) -> None:
    (tmp_path / "crystal_demo").mkdir()
    result = CliRunner().invoke(main, [verb, str(tmp_path / "crystl_demo")])
    assert result.exit_code == 2
    assert f"did you mean {tmp_path / 'crystal_demo'}?" in result.output, result.output


def test_a_printed_command_begins_as_the_program_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "weftrain"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert display.program() == "weftrain"  # the shell finds this very one
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    for called, printed in ((".venv/bin/weftrain", ".venv/bin/weftrain"), ("my env/weftrain", "'my env/weftrain'")):
        monkeypatch.setattr(sys, "argv", [called])
        assert display.program() == printed
    assert "`'my env/weftrain' train crystal_demo`" in CliRunner().invoke(main, ["runs"]).output
    # errors of weftrain and of the parser, a backend's reason, and its outline
    for command, shown in (
        (["trian"], "`'my env/weftrain' train`"),
        (["bench", "compare", "absent", "absent"], "`'my env/weftrain' bench train RECIPE --report FOLDER`"),
        (["backends"], "`'my env/weftrain' backends setup cerebras`"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        output = " ".join(CliRunner().invoke(main, command).output.split())
        assert shown in output
        assert "`weftrain " not in output
    assert "`weftrain " in CliRunner().invoke(main, ["--help"]).output  # as in the documentation made from it


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a/.tmp-page.html-19470-8a85d617"),
            "a/page.html: Permission",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device: free space, or"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system: name another place"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_error_of_the_system_names_the_file_that_was_meant(error: OSError, said: str) -> None:
    assert display.os_problem(error).startswith(said)


def test_as_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "program", lambda: r"a\b/weftrain")
    assert display.as_called("run `weftrain log` or `zcat a | weftrain prep -`") == (
        r"run `a\b/weftrain log` or `zcat a | a\b/weftrain prep -`"
    )
    assert display.as_called("what weftrain reads, `weftrain`, ` and weftrain") == (
        "what weftrain reads, `weftrain`, ` and weftrain"
    )


def printed_plainly(tree: ast.AST) -> list[int]:
    """Lines where a terminal is told a command that begins with plain `weftrain`."""
    verbs = "|".join(name for group in VERBS.values() for name in group)
    return [
        text.lineno
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("echo", "print", "say", "add_row")
        for text in ast.walk(call)
        if isinstance(text, ast.Constant) and re.search(rf"\bweftrain ({verbs})\b", str(text.value))
    ]


def test_a_terminal_is_told_no_plain_command() -> None:
    assert printed_plainly(ast.parse("click.echo(f'then: weftrain log {run}')")) == [1]
    assert {
        path.name: lines
        for path in (ROOT / "cli").glob("*.py")
        if (lines := printed_plainly(ast.parse(path.read_text())))
    } == {}


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, weftrain: Callable[..., Result]) -> None:
    def interrupted(*ignored: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weftrain.analysis.report.run_list.list_runs", interrupted)
    result = weftrain("runs", os.getcwd())
    assert (result.exit_code, result.output) == (130, "weftrain: interrupted\n")


def alive_in(group: int) -> list[str]:
    """Processes of a group, without those that have ended and that nobody has waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def test_ctrl_c_in_prep_ends_its_workers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The signal reaches every process of the terminal's group, as a terminal sends it."""
    for number in range(6):
        words = (f"word{number}_{index * 7919 % 9973}" for index in range(40_000))
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    options = ["--name", "a", "--output", str(tmp_path / "out"), "--workers", "2", "--sequence-length", "64"]
    command = [*PROGRAM, "prep", *(str(tmp_path / f"{number}.txt") for number in range(6)), *options]
    prep = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell that started the tests in the background has it ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "out").rglob("*")) and prep.poll() is None:
        time.sleep(0.05)
    os.killpg(prep.pid, signal.SIGINT)
    printed, _ = prep.communicate(timeout=60)
    assert "Traceback" not in printed
    if prep.returncode == 130:
        assert printed.endswith("weftrain: interrupted; the same command goes on where it stopped\n"), printed
    else:
        assert prep.returncode == -signal.SIGINT  # in the tokenizer's native code
    ends = time.monotonic() + 10
    while (left := alive_in(prep.pid)) and time.monotonic() < ends:  # multiprocessing's tracker ends by itself
        time.sleep(0.05)
    assert not left
