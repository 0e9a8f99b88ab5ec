"""Starts the checks within a budget of time, keeps what they say, and writes the page."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weftrain.analysis.first_contact.checks import CHECKS, Check
from weftrain.analysis.first_contact.command_line import PROGRAM
from weftrain.analysis.first_contact.conditions import SCRATCH
from weftrain.analysis.first_contact.findings import RESULTS, Answer, Finding, Findings, read_findings
from weftrain.analysis.first_contact.machine import ANSWERS
from weftrain.analysis.first_contact.page import PAGE, page_html
from weftrain.analysis.machine.clock_log import ClockLog
from weftrain.core.errors import WeftrainError
from weftrain.core.formats import fsops

AT_ONCE = 5  # proofs, which are not timed
_LEAST_S = 8.0  # below which a check is not begun
_LAST_LINES = 3  # of a process that failed


class FirstContactError(WeftrainError):
    """A check that does not exist, a folder that holds another run's findings, or a device that does not answer."""


def first_contact(
    folder: Path, budget_s: float, only: Sequence[str], dry: bool, tell: Callable[[str], None]
) -> list[Finding]:
    """Run the checks (all, or `only` those), write results.jsonl and report.html, and give the findings.

    Raises FirstContactError.
    """
    if unknown := [name for name in only if name not in CHECKS]:
        raise FirstContactError(f"there is no check '{unknown[0]}'; there is: {', '.join(CHECKS)}")
    if (folder / RESULTS).exists():
        raise FirstContactError(
            f"{folder / RESULTS}: holds the findings of an earlier run; name a new folder with --out"
        )
    fsops.make_dirs(folder)
    session = _Session(folder, budget_s, dry, tell)
    chosen = [check for check in CHECKS.values() if not only or check.name in only]
    first = [check for check in chosen if check.name == "machine"]
    try:
        with ClockLog() as clocks:
            for check in first:
                session.run(check, clocks)
            for one in read_findings(folder):
                if one.what == ANSWERS and one.ok is False:
                    raise FirstContactError(str(one.details.get("why", "the device does not answer")))
            session.run_together([check for check in chosen if not check.alone])
            for check in chosen:
                if check.alone and check not in first:
                    session.run(check, clocks)
    finally:
        session.end()
        fsops.remove_tree(folder / SCRATCH)
        found = read_findings(folder)
        fsops.write_bytes(folder / PAGE, page_html(found).encode())
    return found


def command_of(check: Check, folder: Path, dry: bool) -> list[str]:
    """What runs one check in a process of its own."""
    return [*PROGRAM, "gpu", "--child", check.name, "--out", str(folder), *(["--dry"] if dry else [])]


class _Session:
    """What is common to the checks of one run."""

    def __init__(self, folder: Path, budget_s: float, dry: bool, tell: Callable[[str], None]) -> None:
        self._folder, self._dry, self._tell = folder, dry, tell
        self._end_s = time.monotonic() + budget_s
        self._running: set[int] = set()
        self._ended = False

    def run_together(self, checks: Sequence[Check]) -> None:
        """Several at once; dry, on a CPU, one after another."""
        with ThreadPoolExecutor(1 if self._dry else AT_ONCE) as pool:
            try:
                list(pool.map(lambda check: self.run(check, None), checks))
            except BaseException:
                self.end()  # before the pool waits for its threads
                raise

    def end(self) -> None:
        """End what still runs, and begin nothing more."""
        self._ended = True
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)

    def run(self, check: Check, clocks: ClockLog | None) -> None:
        """One check in a process of its own; a last line says how long it took and how the device was meanwhile."""
        if self._ended:
            return
        findings = Findings(self._folder, check.name, self._tell)
        begin = time.monotonic()
        if (left := self._end_s - begin) < _LEAST_S:
            findings.write("", Answer(None, details={"why": "no time was left: give a larger --budget"}))
            return
        limit_s = min(left, check.limit_s * (4 if self._dry else 1))
        errors = self._folder / f"{check.name.replace(' ', '-')}.err"
        why = self._why_it_failed(check, limit_s, errors)
        took_s = time.monotonic() - begin
        conditions = {} if clocks is None else clocks.between(begin, begin + took_s)
        details = {**({"why": why} if why else {}), **({"device": conditions} if conditions else {})}
        findings.write("", Answer(why is None, {"took, s": round(took_s, 1)}, details), took_s)
        if why is None:
            fsops.remove_file(errors)

    def _why_it_failed(self, check: Check, limit_s: float, errors: Path) -> str | None:
        """None, or why the process did not end well. Its standard error stays beside the findings then."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        if self._dry:
            environment["OMP_NUM_THREADS"] = "1"
        with (
            errors.open("wb") as file,
            subprocess.Popen(
                command_of(check, self._folder, self._dry),
                stderr=file,
                env=environment,
                start_new_session=True,  # so that its own processes end with it
            ) as process,
        ):
            self._running.add(process.pid)
            try:
                process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return f"ended after its {limit_s:.0f} s; {errors.name} has its last words"
            finally:
                self._running.discard(process.pid)
        if process.returncode == 0:
            return None
        last = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()][-_LAST_LINES:]
        return f"exit {process.returncode}: {' | '.join(last)[-600:]}"
