"""What hangs is a finding: interrupted in Python, named by the process that ends where native code does not return."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from weftrain.kernels import KernelError
from weftrain.kernels.checks.time_limit import time_limit


def test_a_loop_is_interrupted_and_the_alarm_before_is_kept() -> None:
    before, _ = signal.getitimer(signal.ITIMER_REAL)  # of the test runner
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KernelError, match=r"took longer than 0.05 s"), time_limit(0.05, "swiglu"):
        time.sleep(10)
    with time_limit(5, "swiglu"):
        pass
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (before > 0) == (after > 0)
    assert after <= before


@pytest.mark.prove  # a process that imports torch
def test_native_code_that_does_not_return_ends_the_run_by_name() -> None:
    """A signal handler of Python never runs there: SIGALRM is blocked, which looks the same."""
    program = (
        "import signal, time\n"
        "from weftrain.kernels.checks.time_limit import time_limit\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "with time_limit(0.1, 'swiglu ours sizes'):\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr == "FAILED swiglu ours sizes: did not return within 0.2 s; the run ends here\n"
