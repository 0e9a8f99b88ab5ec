"""The worker process and what the vendor's packages start from it do not outlive the main process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from weftrain.backends.cerebras.process import WORKER

WATCHES = f"""
import os, runpy, subprocess, sys
vendor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(vendor.pid, flush=True)
runpy.run_path({str(WORKER)!r}, run_name="worker")["_end_with"](int(sys.argv[1]))
"""
MAIN = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {WATCHES!r}, str(os.getpid())], start_new_session=True)
time.sleep(120)
"""


def test_worker_and_vendor_end_with_the_main_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MAIN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        vendor = psutil.Process(int(process.stdout.readline()))
        (worker,) = psutil.Process(process.pid).children()
        process.kill()
        _, alive = psutil.wait_procs([worker, vendor], timeout=30)
        assert not alive
