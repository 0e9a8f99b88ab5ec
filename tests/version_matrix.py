"""`make matrix`: weftrain in environments of other Pythons and torches, one after another.

    python tests/version_matrix.py --folder build/matrix python3.11:2.6.0 python3.13:2.13.0

Each environment gets its torch first, then weftrain by a plain `pip install`, which must leave that torch as it is.
`weftrain gpu --dry` and a short set of tests then run there. A Python that this machine lacks is named and passed over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100", "setuptools>=77")
TESTS = (
    "tests/backends/test_local.py",
    "tests/backends/common/test_device.py",
    "tests/backends/cuda/test_float8.py",
    "tests/core/test_checkpoint.py",
    "tests/core/test_model.py",
    "tests/core/test_trainer.py",
    "tests/kernels/test_cuda_devices.py",
    "tests/kernels/test_derivatives.py",
    "tests/kernels/test_registry.py",
    "tests/kernels/test_triton_version.py",
)


@dataclass(frozen=True)
class Pair:
    """A Python to make an environment with, and the torch to put into it."""

    python: str
    torch: str


@dataclass(frozen=True)
class Result:
    """What became of one pair. verdict: "passed", "failed: ..." or "passed over: ..."."""

    python: str
    torch: str
    verdict: str
    seconds: float

    def row(self) -> str:
        return f"| {self.python} | {self.torch} | {self.verdict} | {self.seconds:.0f} s |"


class StepError(Exception):
    """A step of a pair that did not succeed."""


def pair_of(text: str) -> Pair:
    """'python3.11:2.6.0' -> that pair. Raises ValueError."""
    python, _, torch = text.partition(":")
    if not python or not torch.replace(".", "").isdigit():
        raise ValueError(f"{text}: give PYTHON:TORCH, such as python3.11:2.6.0")
    return Pair(python, torch)


def run(what: str, command: list[str], log: Path, cwd: Path = ROOT) -> str:
    """The command's output, which is also in the log. Raises StepError with its last line."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise StepError(f"{what}: {said[-1][:200] if said else f'exit {done.returncode}'}; {log} has the rest")
    return done.stdout


def environment(pair: Pair, folder: Path, index: str, log: Path) -> Path:
    """The Python of an environment that has the pair's torch and this tree's weftrain, as `pip install .` leaves it."""
    there = folder / f"{Path(pair.python).name}-torch{pair.torch}"
    python = there / "bin" / "python"
    if not python.exists():
        run("venv", [pair.python, "-m", "venv", str(there)], log)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = torch_in(python)
    if installed != pair.torch:
        run("torch", [*pip, f"torch=={pair.torch}", *(["--index-url", index] if index else [])], log)
    run("weftrain", [*pip, "--force-reinstall", "--no-deps", str(ROOT)], log)
    run("what weftrain needs", [*pip, str(ROOT), *NEEDED], log)
    if (after := torch_in(python)) != pair.torch:
        raise StepError(f"`pip install .` replaced torch {pair.torch} by {after}")
    return python


def torch_in(python: Path) -> str:
    """The public version of the torch of an environment, or ""."""
    program = "import importlib.metadata as m; print(m.version('torch').partition('+')[0])"
    return subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False).stdout.strip()


def check(pair: Pair, folder: Path, index: str) -> Result:
    """Make the pair's environment and run the tests in it."""
    begin = time.monotonic()
    log = folder / f"{Path(pair.python).name}-torch{pair.torch}.log"
    if shutil.which(pair.python) is None:
        return Result(pair.python, pair.torch, f"passed over: this machine has no {pair.python}", 0.0)
    try:
        python = environment(pair, folder, index, log)
        report = folder / f"{log.stem}-report"
        shutil.rmtree(report, ignore_errors=True)
        dry = [str(python), "-m", "weftrain.cli", "gpu", "--dry", "--budget", "1800", "--out", str(report)]
        run("weftrain gpu --dry", dry, log, folder)
        pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not prove and not cerebras"]
        verdict = run("tests", [*pytest, *TESTS], log).strip().splitlines()[-1].strip("= ")
    except StepError as error:
        return Result(pair.python, pair.torch, f"failed: {error}", time.monotonic() - begin)
    return Result(pair.python, pair.torch, f"passed ({verdict})", time.monotonic() - begin)


def main() -> None:
    """Exit code 1 if a pair failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=pair_of)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--index", default="", help="package index for torch; default: pip's own")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYTHONPATH", None)
    results = []
    for pair in given.pairs:
        results.append(check(pair, folder, given.index))
        print(results[-1].row(), flush=True)
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    sys.exit(any(result.verdict.startswith("failed") for result in results))


if __name__ == "__main__":
    main()
