"""What is said of a GPU that cannot be used: one line with its remedy. torch.cuda is a stand-in throughout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from weftrain.kernels.cuda_devices import absence, computes_bfloat16

# As torch 2.13 has them: torch/cuda/__init__.py, c10/cuda/CUDAFunctions.cpp.
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
NONE = "No CUDA GPUs are available"
MISMATCH = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 803: system has unsupported display driver / cuda driver combination"
)
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100", "compute_120"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that torch is a CUDA 13 build that sees devices of a capability, or fails to initialise."""

    def pretend(
        capability: tuple[int, int] = (9, 0), count: int = 1, fails: str = "", busy: str = "", built: str = "13.0"
    ) -> None:
        def init() -> None:
            if fails:
                raise RuntimeError(fails)

        def zeros(*_: object, **__: object) -> torch.Tensor:
            if busy:
                raise RuntimeError(busy)
            return torch.ones(1)

        monkeypatch.setattr(torch.version, "cuda", built or None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: not fails)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Example")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return pretend


def test_a_device_that_works_has_nothing_to_say(gpu: Callable[..., None]) -> None:
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1)):
        gpu(capability)
        assert absence() is None


@pytest.mark.parametrize(
    ("pretended", "expected", "broken"),
    [
        ({"built": ""}, "is a CPU build: install a CUDA build of torch", False),
        ({"fails": NO_DRIVER}, "there is no NVIDIA driver: install one; a container needs the host's", False),
        ({"fails": TOO_OLD}, "the NVIDIA driver, which has CUDA 12.4, is older than the CUDA 13.0 of torch", True),
        ({"fails": NONE}, "the driver shows no GPU: see what `nvidia-smi -L` lists", False),
        ({"fails": MISMATCH}, "Error 803: system has unsupported display driver", True),
        ({"capability": (7, 0)}, "has no code for NVIDIA Example (sm_70; it was built for sm_75, sm_80", True),
        ({"capability": (11, 0)}, "has no code for NVIDIA Example (sm_110; it was built for", True),
        (
            {"busy": "CUDA error: all CUDA-capable devices are busy\nCompile with"},
            "NVIDIA Example does not answer",
            True,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_reason_is_one_line(
    gpu: Callable[..., None], pretended: dict[str, object], expected: str, broken: bool
) -> None:
    gpu(**pretended)
    found = absence()
    assert found is not None
    assert expected in found.reason
    assert "\n" not in found.reason
    assert found.broken is broken


def test_a_gpu_that_is_not_there_is_named(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(count=4)
    assert absence(3) is None
    found = absence(4)
    assert found is not None
    assert found.reason == "there is no CUDA device 4: torch sees 4 devices"
    gpu(fails=NONE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = absence()
    assert found is not None
    assert found.broken
    assert found.reason == "CUDA_VISIBLE_DEVICES=7 leaves no GPU: unset it, or name one that `nvidia-smi -L` lists"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # how many people say that they want the CPU
    found = absence()
    assert found is not None
    assert not found.broken


def test_machine_code_that_is_exact_runs_on_no_other(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90a"])
    assert absence() is None
    gpu((12, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_120a", "sm_90"])
    assert absence() is not None


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_came_with_sm_80(gpu: Callable[..., None], capability: tuple[int, int], has: bool) -> None:
    gpu(capability)
    assert computes_bfloat16() is has
