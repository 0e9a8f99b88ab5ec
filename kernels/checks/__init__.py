"""`weftrain kernels check`: is an implementation right, does it compose, is it safe.

Nothing here knows an implementation by name. What holds for the reference, the op's contract (kernels/arguments.py) and
the formula in float64 is asked of whatever the registry offers, third parties' included.
"""

from weftrain.kernels.checks.engine import CHECKS, run_checks, summary
from weftrain.kernels.checks.findings import DTYPES, Check, CheckReport, Finding, SkippedCase

__all__ = ["CHECKS", "DTYPES", "Check", "CheckReport", "Finding", "SkippedCase", "run_checks", "summary"]
