"""A device that is not there, and more threads than a process may have, are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weftrain.backends.common import device
from weftrain.backends.common.device import (
    DeviceOptions,
    device_fingerprint,
    prepare_process,
    torch_device,
    use_threads,
)
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


def test_compiled_functions_are_kept_by_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = Job(tiny_recipe("crystal"), Plan(0, 1), DeviceOptions(device="cpu", huge_pages=False))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with torch.compiler.config.patch(cache_key_tag="of the user"):  # pytest's monkeypatch would delete it afterwards
        for _ in range(2):
            prepare_process(job, DeviceOptions)
            tag = torch.compiler.config.cache_key_tag
            assert tag == "of the user cpu AVX512", "once, beside what the user set"
    assert hasattr(torch.compiler.config, "cache_key_tag")


_COMPILED = """
import os, sys, torch
from weftrain.backends.common.device import keep_compiled_apart
keep_compiled_apart()
x = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
function = lambda x: torch.relu(x * 2 + x.roll(1)).softmax(-1)
print(float((torch.compile(function)(x) - function(x)).abs().max()))
"""


@pytest.mark.prove
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or shutil.which("g++") is None,
    reason="needs AVX-512, of which AVX2 is the other, and a C++ compiler",
)
def test_what_was_compiled_for_longer_vectors_is_not_used_for_shorter(tmp_path: Path) -> None:
    """Torch alone takes it from its cache, and the largest difference here was 8e37."""
    for capability in ("avx512", "avx2"):
        told = {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        run = subprocess.run([sys.executable, "-c", _COMPILED], env=os.environ | told, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        assert float(run.stdout) < 1e-6, capability


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


# A record keeps its keys: one that is gone would be compared with nothing, and a new one is not in older records.
CPU_KEYS = ["code", "cpu_capability", "cuda", "float32_matmul_precision", "mkl", "mkl_cbwr", "mkl_enable_instructions"]
CPU_KEYS += ["mkldnn", "onednn", "onednn_default_fpmath_mode", "onednn_max_cpu_isa", "processor", "python", "torch"]


def test_a_fingerprint_has_what_decides_the_bits_of_a_cpu_and_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def keys(kind: str) -> dict[str, Any]:
        found = device_fingerprint("local", torch.device(kind), {}, {}, recomputes="none").as_json()
        return {
            name: found[name] for name in sorted(found) if name not in ("backend", "device", "device_type", "threads")
        }

    assert list(keys("cpu")) == CPU_KEYS
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = keys("cuda")
    assert set(before) - set(CPU_KEYS) == set(device.cuda_numerics(torch.device("cuda"))) - set(CPU_KEYS)
    assert (before["cublas_workspace_config"], before["multiprocessors"]) == (":16:8", 132)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        after = json.loads(json.dumps(keys("cuda")))
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True
    assert {name for name in after if after[name] != before[name]} == {"allow_bf16_reduced_precision_reduction"}
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: 12.2.0\n"
    )
    assert device._driver_version(version) == "570.133.20"
    assert device._driver_version(tmp_path / "none") is None


def test_what_a_processor_and_its_libraries_are_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 106\nmodel name\t: Xeon\nstepping\t: 6\n\nprocessor\t: 1\nmodel\t: 7\n")
    assert device._processor(file) == "Xeon, model 106, stepping 6"
    monkeypatch.setattr(torch.__config__, "show", lambda: "- Intel(R) MKL-DNN v3.12.0 (Git Hash 8)\n- x\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = device._cpu_libraries()
    assert (found["onednn"], found["mkl"], found["onednn_max_cpu_isa"]) == ("3.12.0", None, "AVX2")


def test_the_hash_of_the_code_is_that_of_all_that_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A changed byte, a new file and a moved one change it; a page beside the code does not."""
    hashes = []
    for package in ("core", "kernels", "backends"):
        (tmp_path / package).mkdir()
    monkeypatch.setattr(
        device.importlib,
        "import_module",
        lambda name: SimpleNamespace(__path__=[str(tmp_path / name.partition(".")[2])]),
    )
    changes = (("core/a.py", b"1"), ("core/a.py", b"2"), ("kernels/a.cpp", b"2"), ("backends/x.md", b"2"))
    for name, data in changes:
        (tmp_path / name).write_bytes(data)
        hashes.append(device.code_hash.__wrapped__())
    (tmp_path / "core" / "a.py").rename(tmp_path / "backends" / "a.py")
    hashes.append(device.code_hash.__wrapped__())
    assert len(set(hashes)) == 4
    assert hashes[2] == hashes[3]


def test_replayable_numerics_ask_torch_for_deterministic_algorithms_on_cuda_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe]
) -> None:
    monkeypatch.setattr(device, "computes_bfloat16", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    asked = {}
    try:
        for kind, numerics in (("cpu", "replayable"), ("cuda", "fast"), ("cuda", "replayable")):
            monkeypatch.setattr(device, "torch_device", lambda wanted, kind=kind: torch.device(kind))
            prepare_process(
                Job(tiny_recipe("crystal", f"precision.numerics={numerics}"), Plan(0, 1), DeviceOptions()),
                DeviceOptions,
            )
            asked[kind, numerics] = (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert list(asked.values()) == [(False, None), (False, None), (True, ":4096:8")]
    assert not torch.backends.cudnn.benchmark
