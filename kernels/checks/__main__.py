"""`python -m weftrain.kernels.checks`: every check in a process of its own, without the command line's dependencies.

TRITON_INTERPRET=1 must be in the environment before Python starts; then the interpreter's bfloat16 is mended first. The
exit code is 1 if a finding failed or nothing was checked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from weftrain.kernels.checks import DTYPES, run_checks, summary
from weftrain.kernels.checks.findings import Finding, describe, name_of, to_json
from weftrain.kernels.checks.time_limit import LIMIT_S
from weftrain.kernels.registry import load_catalog
from weftrain.kernels.triton_version import interpreting


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    catalog = load_catalog()
    implementations = [item for by_source in catalog.values() for variants in by_source.values() for item in variants]
    if options.third_party:
        implementations = [item for item in implementations if not item.function.__module__.startswith("weftrain.")]
    if interpreting():
        from weftrain.kernels.checks.interpreter import install

        install()
    dtypes = [getattr(torch, name) for name in options.dtypes]
    report = run_checks(
        options.ops,
        options.sources,
        options.device,
        dtypes,
        options.checks,
        implementations=implementations,
        thorough=options.thorough,
        limit_s=options.limit,
        found=_print_failure,
    )
    if options.json:
        options.json.write_text(to_json(report))
    for line in summary(report):
        print(line)
    return 1 if report.failed or not report else 0


def _print_failure(finding: Finding) -> None:
    """At once: what follows may take minutes, or not come back."""
    if not finding.ok:
        print("failed", describe(finding), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weftrain.kernels.checks", description="Hold kernels to their contract."
    )
    parser.add_argument("--ops", nargs="+")
    parser.add_argument("--sources", nargs="+")
    parser.add_argument("--checks", nargs="+")
    parser.add_argument("--device", default="cpu")
    names = [name_of(dtype) for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--thorough", action="store_true", help="every size and range in every dtype, and times")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for one question")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--third-party", action="store_true", help="only what other packages provide")
    return parser


if __name__ == "__main__":
    sys.exit(main())
