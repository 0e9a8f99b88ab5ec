"""A device that is not there, and more threads than a process may have, are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from weftrain.backends.common import device
from weftrain.backends.common.device import DeviceOptions, prepare_process, torch_device, use_threads
from weftrain.core.backend import Job, Plan
from weftrain.core.config import MAX_THREADS, Recipe
from weftrain.core.errors import BackendError
from weftrain.kernels.cuda_devices import Absence


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Without a GPU `auto` is the CPU and says nothing; with one that does not work it says why."""
    monkeypatch.setattr(device, "absence", lambda index: Absence("there is no NVIDIA driver: install one", False))
    assert torch_device("auto") == torch.device("cpu")
    assert not recwarn
    with pytest.raises(
        BackendError, match=r"device is cuda, and there is no NVIDIA driver: install one; or set device=cpu"
    ):
        torch_device("cuda")
    monkeypatch.setattr(device, "absence", lambda index: Absence("the NVIDIA driver is too old: update it", True))
    with pytest.warns(UserWarning, match=r"^computing on the CPU: the NVIDIA driver is too old: update it; device=cpu"):
        assert torch_device("auto") == torch.device("cpu")
    monkeypatch.setattr(device, "absence", lambda index: None)
    assert torch_device("auto") == torch_device("cuda") == torch.device("cuda")
    assert torch_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_gpu_without_bf16_arithmetic_is_named(
    compute: str, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(device, "absence", lambda index: None)
    monkeypatch.setattr(device, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    prepare_process(
        Job(tiny_recipe("crystal", f"precision.compute={compute}"), Plan(0, 1), DeviceOptions()), DeviceOptions
    )
    assert [str(one.message) for one in recwarn] == (
        ["Tesla T4 has no bf16 arithmetic (it came with sm_80), so steps are slow: set precision.compute=float32"]
        if compute == "bfloat16"
        else []
    )


def test_threads_of_a_stranger_are_bounded(tiny_recipe: Callable[..., Recipe]) -> None:
    job = Job(tiny_recipe(), Plan(0, 1), DeviceOptions(), threads=MAX_THREADS + 1)
    with pytest.raises(BackendError, match="CPU threads are more than"):
        use_threads(job, 0)


def test_a_gpus_fingerprint_names_what_the_order_of_sums_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    assert (
        device.device_fingerprint("local", torch.device("cuda"), {}, {}, recomputes="none").more["multiprocessors"]
        == 132
    )
    assert (
        "multiprocessors" not in device.device_fingerprint("local", torch.device("cpu"), {}, {}, recomputes="none").more
    )
