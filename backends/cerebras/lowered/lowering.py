"""From a recipe to artifacts and a report that can be trusted, or to one line that says what does not lower, where, and
what to do.

Everything is made in a folder of another name beside the one that was asked for, and
gets its name last. A lowering that failed stays under `NAME.failed` for whoever wants to read it; nothing half made
ever stands where a whole one should.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.backends.cerebras import environment
from weftrain.backends.cerebras.job import WorkerJob
from weftrain.backends.cerebras.lowered.graph import GraphError
from weftrain.backends.cerebras.lowered.mlir_text import read_graph
from weftrain.backends.cerebras.lowered.report import LoweringReport, make_report
from weftrain.backends.cerebras.process import ROOT, NoClusterError, WorkerError, WorkerProcess
from weftrain.core.errors import BackendError, file_problem
from weftrain.core.formats import fsops

REPORT = "report.json"
GENERIC = "cirh.generic.mlir"
Progress = Callable[[str, float], None]

# What the front end says -> what to write instead.
REMEDIES = (
    (r"nonzero|masked_select|unique", "its shape depends on values: compute with a mask instead (torch.where)"),
    (
        r"aten::index|aten\.index|index_put",
        "advanced indexing has no backward there: compare positions and select, or use embedding or gather",
    ),
    (
        r"_local_scalar_dense|Boolean value",
        "it asks for a value while the step is traced (.item(), a condition on a tensor): use torch.where",
    ),
    (r"complex", "complex numbers do not lower: write the rotation with real pairs, as kernels/reference.py does"),
    (r"no attribute 'lazy'|checkpoint", "torch.utils.checkpoint cannot be traced: leave recomputation to the backend"),
    (
        r"bool tensor is not supported|triu|tril",
        "triu and tril of a boolean tensor do not lower: compare positions (arange) instead",
    ),
)


class LoweringError(BackendError):
    """What would not lower, with the line of source it came from and the remedy."""


@dataclass(frozen=True)
class Lowered:
    folder: Path
    report: LoweringReport


def lower(
    job: Callable[[Path], WorkerJob],
    output: Path,
    silence_s: float,
    progress: Progress = lambda words, share: None,
    python: Path | None = None,
    root: Path = ROOT,
) -> Lowered:
    """Lower (or compile) a job's recipe into `output`, which holds the artifacts and report.json afterwards.

    job: given the folder to work in. An earlier lowering at `output` is replaced; anything else there is refused.
    Raises LoweringError; WorkerError, with the vendor's own words, where a cluster is needed and not there.
    """
    if output.exists() and not (output / REPORT).is_file():
        raise BackendError(
            f"{output}: is there already and holds no {REPORT} of an earlier lowering: name another folder with "
            "--output"
        )
    fsops.make_dirs(output.parent)
    work = fsops.temporary_beside(output)
    program = environment.python() if python is None else python
    try:
        report = _lower(job(work), program, silence_s, progress, root)
    except BackendError as error:
        kept = _set_aside(work, output)
        raise (
            type(error)(f"{error}; what there is lies in {kept}") if isinstance(error, LoweringError) else error
        ) from None
    except OSError as error:
        raise BackendError(
            f"{output}: the artifacts cannot be written: {file_problem(error)}: check the disk and its permissions"
        ) from error
    if output.exists():
        fsops.remove_tree(output)
    fsops.rename(work, output)
    return Lowered(output, report)


def _lower(job: WorkerJob, python: Path, silence_s: float, progress: Progress, root: Path) -> LoweringReport:
    names: list[str] = []
    seconds, peak = 0.0, 0
    try:
        with WorkerProcess(job, silence_s, python, root) as worker:
            for event in _until_done(worker, progress):
                names = event.get("parameters", names)
                seconds, peak = event.get("seconds", seconds), event.get("peak_bytes", peak)
    except NoClusterError:
        raise
    except WorkerError as error:
        raise _explained(error) from None
    folder = Path(job.artifacts)
    progress("reading the graph", 0.9)
    executor = folder / "executors" / "000001"
    tracebacks = sorted(executor.glob("traceback_*.json"))
    if tracebacks:
        raise LoweringError(explain_traceback(tracebacks[0], root))
    for name in ("torch.mlir", "cirh.mlir"):
        path = executor / name
        if not path.is_file() or not path.stat().st_size:
            raise LoweringError(
                f"{name} is {'empty' if path.is_file() else 'missing'}, though the compiler reported no failure"
            )
    generic = folder / GENERIC
    print_generic(python, executor / "cirh.mlir", generic)
    try:
        graph = read_graph(generic)
    except GraphError as error:
        raise LoweringError(str(error)) from None
    report = make_report(graph, job.recipe, names, job.vendor_version, seconds=seconds, peak_bytes=peak)
    if report.problems:
        raise LoweringError(f"the lowered graph is not the recipe's step: {'; '.join(report.problems[:4])}")
    fsops.write_bytes(folder / REPORT, json.dumps(report.as_json(), indent=1).encode())
    return report


def _until_done(worker: WorkerProcess, progress: Progress) -> Iterator[dict[str, Any]]:
    shares = {"loading the vendor's package": 0.02, "building the model": 0.1, "tracing and lowering the step": 0.25}
    for _ in range(2):  # until it is ready, and until it is done
        for event in worker.events():
            if event["event"] == "phase":
                progress(event["name"], shares.get(event["name"], 0.5))
            yield event


def print_generic(python: Path, source: Path, target: Path) -> None:
    """Have the vendor's tool print a graph in its generic form, locations included. Raises LoweringError."""
    tool = python.parent / "torch-cirh-opt"
    command = [
        str(python),
        str(tool),
        "--mlir-print-op-generic",
        "--mlir-print-debuginfo",
        str(source),
        "-o",
        str(target),
    ]
    if not tool.is_file():
        raise LoweringError(
            f"{tool} is missing: the environment is not whole; remove it and run `{environment.SETUP_COMMAND}`"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode or not target.is_file():
        raise LoweringError(
            f"torch-cirh-opt cannot read {source.name}: "
            f"{(done.stderr.strip().splitlines() or ['it said nothing'])[-1][:300]}"
        )


def remedy(words: str) -> str | None:
    """What to write instead of what a failure names, where it is known."""
    return next((text for pattern, text in REMEDIES if re.search(pattern, words)), None)


def _explained(error: WorkerError) -> BackendError:
    """A failure of the worker as one line: the vendor's reason, our line, the remedy."""
    reason = (
        str(error)
        .split("\n\nStack Trace")[0]
        .split("\nCalled with")[0]
        .split("\nTo re-run")[0]
        .strip()
        .replace("\n", " ")
    )
    if not error.frames:
        return LoweringError(reason[:600])
    how = remedy(f"{reason} {error.frames[0]}")
    return LoweringError(f"{reason[:300].rstrip('.')}; at {error.frames[0]}" + (f"; {how}" if how else ""))


def explain_traceback(path: Path, root: Path = ROOT) -> str:
    """The compiler's own report of a failed lowering as one line: op, module, our line of source, remedy."""
    text = path.read_text(errors="replace").replace('\\"', '"')
    op = re.search(r'loc\("([^"/]*)/(aten::\w+)"', text)
    message = re.search(r'"message":"(failed to [^"]{1,160})', text)
    line = next(
        (
            f"{Path(file).relative_to(root)}:{number} in {function}"
            for function, file, number in re.findall(r'"(\w+)"\("([^"]+)":(\d+):', text)
            if file.startswith(f"{root}/")
        ),
        "no line of ours",
    )
    scope, name = op.groups() if op else ("?", "an op")
    how = remedy(name)
    said = f" ({message.group(1)})" if message else ""
    return f"{name} of module {scope} does not lower{said}; at {line}" + (f"; {how}" if how else "")


def _set_aside(work: Path, output: Path) -> Path:
    kept = output.with_name(f"{output.name}.failed")
    if work.exists():
        if kept.exists():
            fsops.remove_tree(kept)
        fsops.rename(work, kept)
    return kept
