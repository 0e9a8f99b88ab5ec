"""Nothing that torchrun started outlives it, whatever it is doing."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

CHILD = (
    "import time; from weftrain.cli.launcher import end_with_launcher; end_with_launcher(); print('watches', "
    "flush=True); time.sleep(120)"
)
LAUNCHER = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {CHILD!r}]); time.sleep(120)"


@pytest.mark.parametrize("elastic", [True, False])
def test_a_process_ends_with_its_launcher(elastic: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    variables |= {"TORCHELASTIC_RUN_ID": "test"} if elastic else {}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, env=variables) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"watches\n"
        (child,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        _, alive = psutil.wait_procs([child], timeout=30 if elastic else 0)
        assert bool(alive) != elastic  # ranks that were started by hand may outlive a shell
        for process in alive:
            process.kill()
