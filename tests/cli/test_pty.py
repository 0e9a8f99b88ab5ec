"""The progress of a run in a real terminal of 40 and of 80 columns, and in a log where there is no terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

# A run as `train` shows it: lines that stay, and a bar that is drawn again and again.
PROGRAM = """
import time
from weftrain.cli import display
display.QUIET_SECONDS = 0.2
with display.plain_output():
    console = display.Console()
    with display.Bar(console, "crystal_demo", 240) as bar:
        for step in range(1, 9):
            bar.update(step * 30, f"loss 4.{step:04d}  12,345 tokens/s and some more words")
            if step == 4:
                bar.say("step    120  held-out words (64 of 1,024 rows): loss 4.1234, perplexity 61.77")
            time.sleep(0.11)
    console.print("end of the run")
"""
SEQUENCES = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


def in_terminal(columns: int) -> str:
    """All that the program writes to a pseudo-terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment | {"TERM": "xterm"},
    )
    os.close(follower)
    written = bytearray()
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # the last writer has closed it
            break
        if not block:
            break
        written += block
    os.close(leader)
    assert process.wait(timeout=30) == 0, written
    return written.decode()


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_shows_one_bar_that_never_wraps(columns: int) -> None:
    written = in_terminal(columns)
    plain = SEQUENCES.sub("", written)
    drawn = [line for line in re.split("[\r\n]", plain) if line.startswith("crystal_demo")]
    assert len(drawn) > 3
    assert all(len(line) <= columns for line in drawn), drawn
    assert all(re.match(r"crystal_demo .*\d+/240", line) for line in drawn), drawn
    assert any("loss 4" in line for line in drawn), drawn
    assert ("━" in "".join(drawn)) is (columns == 80)
    said = "step    120  held-out words (64 of 1,024 rows): loss 4.1234, perplexity 61.77"
    assert said in plain.replace("\r\n", "\n")  # the terminal wraps it, not the program: it can be copied whole
    assert plain.rstrip().endswith("end of the run")
    assert "\x1b[?25h" in written[written.rindex("\x1b[?25l") :]  # the cursor is shown again


def test_a_log_has_plain_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "40", "TERM": "xterm"},
    )
    lines = done.stdout.splitlines()
    assert not SEQUENCES.search(done.stdout)
    assert "\r" not in done.stdout
    progress = [line for line in lines if line.startswith("crystal_demo ")]
    assert len(progress) >= 2
    assert all(
        re.fullmatch(r"crystal_demo \d+/240 loss 4\.\d{4}  12,345 tokens/s and some more words", line)
        for line in progress
    )
    assert lines[-1] == "end of the run"
    assert len(lines) == len(progress) + 2
