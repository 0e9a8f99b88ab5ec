"""One check in this process: `python -m weftrain.analysis.first_contact CHECK FOLDER [--dry]`. launch.py starts it."""

from __future__ import annotations

import argparse
from pathlib import Path

from weftrain.analysis.first_contact.checks import CHECKS
from weftrain.analysis.first_contact.conditions import Conditions
from weftrain.analysis.first_contact.findings import Findings


def main() -> None:
    """Run the check named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    check = CHECKS[given.check]
    check.run(
        Conditions(given.folder, given.dry), Findings(given.folder, check.name, lambda line: print(line, flush=True))
    )


if __name__ == "__main__":
    main()
