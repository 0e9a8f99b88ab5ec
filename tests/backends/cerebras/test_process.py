"""The worker as the main process sees it: what it reports keeps its kind, and no descriptor is left open.

How a death or a silence is reported is shown in lowered/test_lowering.py, where each also leaves no half lowering.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weftrain.backends.cerebras import CerebrasOptions, process, worker_job
from weftrain.backends.cerebras.process import NoClusterError, WorkerError, WorkerProcess
from weftrain.core.config import Recipe
from weftrain.core.errors import NonFiniteError

Tiny = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NonFiniteError", NonFiniteError), ("ClusterConfigError", NoClusterError), ("ValueError", WorkerError)],
)
def test_what_the_worker_could_not_do_keeps_its_kind(
    name: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    monkeypatch.setattr(process, "WORKER", Path(__file__).with_name("stand_in_worker.py"))
    (tmp_path / "behaviour").write_text(
        json.dumps({"kind": "failed", "name": name, "message": "why", "frames": ["core/model.py:1 in f: x"]})
    )
    job = worker_job(tiny_recipe(), CerebrasOptions(), "validate")(tmp_path / "work")
    gc.collect()  # or what earlier tests left open could be closed between the two counts
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match="why"), WorkerProcess(job, 20, Path(sys.executable)) as worker:
        list(worker.events())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_python_without_the_vendors_package_is_said(tmp_path: Path, tiny_recipe: Tiny) -> None:
    job = worker_job(tiny_recipe(), CerebrasOptions(), "validate")(tmp_path / "work")
    words = r"cerebras-pytorch cannot be imported .*: run `weftrain backends setup cerebras`"
    with pytest.raises(WorkerError, match=words), WorkerProcess(job, 60, Path(sys.executable)) as worker:
        list(worker.events())
