"""How the C++ ops come to be: a compiler that is missing or fails is a reason, asked once; nothing is computed outside
the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weftrain.kernels import OPS, KernelError, Spec
from weftrain.kernels.cpp_ops import _build
from weftrain.kernels.cpp_ops.adamw import adamw
from weftrain.kernels.cpp_ops.attention import attention
from weftrain.kernels.cpp_ops.grad_norm import grad_norm
from weftrain.kernels.cpp_ops.grouped_gemm import grouped_gemm
from weftrain.kernels.cpp_ops.linear_cross_entropy import linear_cross_entropy
from weftrain.kernels.cpp_ops.newton_schulz import newton_schulz

SPEC = Spec("adamw", "optimizer", "cpu", torch.float32, OPS["adamw"].attributes)


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "_has_bf16_instructions", lambda: True)
    _build._attempt.cache_clear()
    yield
    _build._attempt.cache_clear()


def compiler(tmp_path: Path, script: str) -> Path:
    """A program that stands in for g++ and counts its calls in `calls`."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >> {tmp_path}/calls\n{script}\n')
    path.chmod(0o755)
    return path


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert _build.unavailable(SPEC) == "the C++ compiler 'no-such-compiler' is not on PATH: install g++"


def test_a_compiler_that_fails_is_asked_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiler(tmp_path, 'echo "loss.cpp:1: error: no such machine" >&2; exit 1')
    monkeypatch.setenv("CXX", str(path))
    for _ in range(3):
        assert _build.unavailable(SPEC) == f"{path} cannot compile kernels/cpp_ops: loss.cpp:1: error: no such machine"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert list((tmp_path / "cache" / "weftrain" / "kernels").iterdir()) == []


def test_another_cpu_device_or_dtype_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not for cuda" in str(_build.unavailable(Spec("adamw", "o", "cuda", torch.float32, {})))
    assert "not float64" in str(_build.unavailable(Spec("adamw", "o", "cpu", torch.float64, {})))
    monkeypatch.setattr(_build, "_has_bf16_instructions", lambda: False)
    assert _build.unavailable(SPEC) == "needs AVX-512 with bfloat16 instructions, which this CPU lacks"


def _call(op: str, function: Any, **changed: Any) -> None:
    function(**{**OPS[op].examples["odd"]("cpu", torch.bfloat16), **changed})


def test_what_is_unavailable_is_not_computed_either() -> None:
    with pytest.raises(KernelError, match=r"attention: source 'cpp' takes bfloat16 .* not bfloat16 \[2, 63, 3, 20\]"):
        _call("attention", attention)  # a head dimension of 20 would be written past its rows
    q = torch.zeros(1, 4, 1, 32)
    with pytest.raises(KernelError, match="not float32"):
        attention(q, q, q, scale=1.0)
    with pytest.raises(KernelError, match="not float16"):
        linear_cross_entropy(**OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float16))
    with pytest.raises(KernelError, match="takes bfloat16 on a CPU, not float16"):
        grouped_gemm(**OPS["grouped_gemm"].examples["odd"]("cpu", torch.float16))
    with pytest.raises(KernelError, match="newton_schulz: source 'cpp' takes bfloat16 on a CPU, not float32"):
        newton_schulz(**OPS["newton_schulz"].examples["odd"]("cpu", torch.float32))
    with pytest.raises(KernelError, match="on meta"):
        grad_norm([torch.zeros(3, device="meta")])
    meta = {name: [torch.zeros(3, device="meta")] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(KernelError, match="on meta"):
        _call("adamw", adamw, **meta, copies=None, gradient_scale=torch.zeros((), device="meta"))
