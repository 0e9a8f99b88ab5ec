"""`weftrain` as a program that does not measure the machine's peak, which takes a second or more at both ends of a run:
python tests/known_peak.py WORDS.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = [sys.executable, __file__]  # for a launcher, which brings a Python of its own: PROGRAM[1:]

if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    from weftrain.cli.launcher import end_with_launcher

    end_with_launcher()
    import weftrain.cli.assembly
    from weftrain.cli.main import main
    from weftrain.core.run.speed import Peak

    weftrain.cli.assembly.measured_peak = lambda device, dtype: Peak(1e11, "known in tests")
    main()
