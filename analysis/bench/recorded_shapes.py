"""The shapes that a recipe's kernels are called with, as a suite for `weftrain kernels bench --suite FILE`.

One step is made with a run of its own, without torch.compile, which would trace a call once and not make it again. Only
the calls of this process are seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from weftrain.analysis.bench.train import BenchError
from weftrain.core.backend import Backend, Job
from weftrain.core.config import CompileOption
from weftrain.core.formats import fsops
from weftrain.core.order.batch import BatchSource
from weftrain.core.run.prepare import prepare_run
from weftrain.kernels.bench.suites import recording


def record_shapes(backend: Backend, job: Job, source: BatchSource, path: Path) -> None:
    """Make the first step of the job and write its calls. Raises BenchError if the backend calls no kernel here."""
    if isinstance(job.options, CompileOption) and job.options.compile:
        job = dataclasses.replace(job, options=job.options.model_copy(update={"compile": False}))
    with recording() as found, contextlib.closing(prepare_run(backend, job)) as run:
        device = run.fingerprint().device_type
        results = run.train(source)
        float(next(results).loss)
        results.close()  # type: ignore[attr-defined]
    if not found.calls:
        raise BenchError(f"the {backend.name} backend calls no kernel in this process, so there is nothing to record")
    about = {"recipe": job.recipe.name, "backend": backend.name, "device": device}
    fsops.write_bytes(path, found.to_json(about).encode())
