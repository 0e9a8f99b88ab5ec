"""What a run in one process needs and takes: the memory that the run is held against, and the words of `plan`."""

from __future__ import annotations

import psutil
import pytest

from weftrain.analysis.machine.devices import DEVICES, speeds
from weftrain.backends.common.alone import outline_alone
from weftrain.backends.common.device_memory import alone_needs
from weftrain.backends.local import BACKEND, LocalOptions
from weftrain.core.errors import BackendError
from weftrain.core.prediction import Predictor, Speeds
from weftrain.core.recipe_file import load_recipe

HERE = Speeds(matmul_flops=200e9, memory_bandwidth=20e9)


def test_the_memory_of_this_machine_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, options = load_recipe("bench_70m").recipe, LocalOptions(compile=True)
    assert isinstance(BACKEND, Predictor)
    found = BACKEND.predict(recipe, options, HERE)
    assert found.needs.memory_bytes == alone_needs(recipe, "none", True, "cpu")
    assert found.fits
    assert (found.largest_micro_batch or 0) > 2
    assert found.step_s == pytest.approx(sum(found.parts.values()))
    assert found.parts["optimizer"] == pytest.approx(71_053_824 * 28 / 20e9, rel=0.01)
    assert "optimizer" in BACKEND.outline(recipe, options)[0]
    little = psutil.virtual_memory()._replace(available=1 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    found = BACKEND.predict(recipe, options, HERE)
    assert (found.fits, found.largest_micro_batch, found.remedies[-1]) == (False, 0, "the streaming backend")


def test_one_gpu_by_name_and_no_more() -> None:
    recipe = load_recipe("amber_7b", ["batch.replicas=1", "data.chunks=null"], "local").recipe
    options = LocalOptions(activation_checkpointing="full")
    found = BACKEND.predict(recipe, options, speeds(1, DEVICES["H200"]))
    assert found.needs.memory_bytes == alone_needs(recipe, "full", False, "cuda")
    assert "communication" not in found.parts
    with pytest.raises(BackendError, match="on one device"):
        BACKEND.predict(recipe, options, speeds(8, DEVICES["H200"]))
    assert "compute copies" in outline_alone(recipe, options, False, "cpu")[0]
