"""The checks' processes: limits, budget, what a killed one leaves, and the whole program on a CPU from an installation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from weftrain.analysis.first_contact import launch
from weftrain.analysis.first_contact.checks import CHECKS, Check
from weftrain.analysis.first_contact.conditions import Conditions
from weftrain.analysis.first_contact.findings import Answer, Findings, read_findings
from weftrain.analysis.first_contact.machine import ANSWERS
from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda.rendezvous import leave
from weftrain.cli.main import main
from weftrain.kernels.cuda_devices import absence

Programs = Callable[..., list[Check]]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Checks that are Python programs: programs(hangs='import time; time.sleep(60)')."""

    def replace(alone: bool = True, limit_s: float = 30.0, **sources: str) -> list[Check]:
        checks = {name: Check(name, lambda *_: None, limit_s, alone, "") for name in sources}
        monkeypatch.setattr(launch, "CHECKS", checks)
        monkeypatch.setattr(launch, "command_of", lambda check, *_: [sys.executable, "-c", sources[check.name]])
        return list(checks.values())

    return replace


def test_a_hanging_check_ends_with_its_own_processes(programs: Programs, tmp_path: Path) -> None:
    """The rest goes on, and what it said is kept."""
    source = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    programs(hangs=f"{source}; p.wait()", fine="pass", limit_s=0.7)
    found = launch.first_contact(tmp_path / "out", 60.0, (), dry=False, tell=lambda line: None)
    assert [(one.check, one.ok) for one in found] == [("hangs", False), ("fine", True)]
    assert found[0].details["why"] == "ended after its 1 s; hangs.err has its last words"
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the process that the check had started still runs")


def test_a_crash_is_said_with_its_last_words(programs: Programs, tmp_path: Path) -> None:
    programs(alone=False, crash="import sys; sys.exit('Segmentation fault in _attention_forward')")
    (found,) = launch.first_contact(tmp_path, 60.0, ["crash"], dry=False, tell=lambda line: None)
    assert found.details["why"] == "exit 1: Segmentation fault in _attention_forward"
    assert "1 bad" in (tmp_path / "report.html").read_text()
    assert "Segmentation fault" in (tmp_path / "crash.err").read_text()


def test_what_no_longer_fits_the_budget_is_named(programs: Programs, tmp_path: Path) -> None:
    programs(one="pass", two="pass")
    found = launch.first_contact(tmp_path, 5.0, (), dry=False, tell=lambda line: None)
    assert [one.details["why"] for one in found] == ["no time was left: give a larger --budget"] * 2


def test_a_device_that_does_not_answer_ends_the_run(programs: Programs, tmp_path: Path) -> None:
    Findings(tmp_path, "machine").write(ANSWERS, Answer(False, details={"why": "NVIDIA Example does not answer"}))
    (tmp_path / "results.jsonl").rename(tmp_path / "said")
    source = f"import shutil; shutil.copy({str(tmp_path / 'said')!r}, {str(tmp_path / 'out' / 'results.jsonl')!r})"
    programs(machine=source, parity="raise SystemExit('never begun')")
    with pytest.raises(launch.FirstContactError, match=r"^NVIDIA Example does not answer$"):
        launch.first_contact(tmp_path / "out", 60.0, (), dry=False, tell=lambda line: None)
    assert {one.check for one in read_findings(tmp_path / "out")} == {"machine"}


def weftrain(*words: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "there is no check 'spede'" in weftrain("gpu", "--dry", "--only", "spede", "--out", tmp_path).output
    Findings(tmp_path, "bits").write("x", Answer())
    assert "holds the findings of an earlier run" in weftrain("gpu", "--dry", "--out", tmp_path).output
    assert all(name in weftrain("gpu", "--list").output for name in CHECKS)
    if absence() is not None:
        refused = weftrain("gpu", "--out", tmp_path / "new")
        assert refused.exit_code != 0
        assert len(refused.output.splitlines()) == 1
        assert not (tmp_path / "new").exists()


# As `--dry` runs them, each of which imports everything in a process of its own; these three do so below, too.
FROM_AN_INSTALLATION = ("machine", "command line", "stream speed")
HERE = [name for name in CHECKS if name != "command line"]


@pytest.mark.parametrize(
    "name",
    [name if name in ("machine", "streaming") else pytest.param(name, marks=pytest.mark.prove) for name in HERE],
)
def test_a_check_in_this_process(name: str, tmp_path: Path) -> None:
    """Each asks something, and nothing is bad. A streamed step's gradients are local's."""
    CHECKS[name].run(Conditions(tmp_path, get_backend, dry=True), Findings(tmp_path, name))
    leave()  # the world of "ranks"
    found = read_findings(tmp_path)
    assert {one.check for one in found if one.what} == {name}
    assert all(one.ok for one in found), found


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checks", [FROM_AN_INSTALLATION, tuple(CHECKS)])
def test_the_program_on_a_cpu_from_an_installation(checks: tuple[str, ...], installed: Path, tmp_path: Path) -> None:
    """Unpacked, first on the path, outside the tree: every check asks something, and nothing is bad."""
    command = [sys.executable, "-m", "weftrain.cli", "gpu", "--dry", "--out", str(tmp_path / "out"), "--budget", "880"]
    command += [word for name in checks for word in ("--only", name)]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = read_findings(tmp_path / "out")
    assert done.returncode == 0, [one for one in found if not one.ok]
    assert {one.check for one in found if one.ok and one.what} == set(checks)
    assert "0 bad" in done.stdout
    assert not (tmp_path / "out" / "scratch").exists()
