"""The interpreter's bfloat16: wrong as it comes, right once mended, and no other version of Triton is touched."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from weftrain.kernels import KernelError
from weftrain.kernels.checks import interpreter


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, **environment},
        check=False,
        timeout=120,
    )


def test_without_the_fix_the_self_test_fails_and_bf16_is_not_offered() -> None:
    code = (
        "from weftrain.kernels.checks.interpreter import computes_bfloat16, self_test\n"
        "import torch, triton\n"
        "from weftrain.kernels import Spec, load_catalog\n"
        "spec = Spec('swiglu', 'ffn', 'cpu', torch.bfloat16, {'intermediate_size': 8})\n"
        "print(computes_bfloat16(), load_catalog()['swiglu']['triton'][0].unavailable(spec))\n"
        "self_test()\n"
    )
    done = in_a_process(code, TRITON_INTERPRET="1")
    assert done.stdout.startswith("False the interpreter of triton 3.7.1 computes on the bit patterns of bfloat16")
    error = done.stderr.splitlines()[-1]
    assert "Triton's interpreter computes bfloat16 wrongly here" in error
    for operation in ("add", "multiply", "compare", "sum", "dot", "rounding to nearest even", "where"):
        assert f" {operation}," in error, error


def test_a_process_that_does_not_interpret_is_refused() -> None:
    done = in_a_process("from weftrain.kernels.checks.interpreter import install\ninstall()")
    assert done.returncode == 1
    assert "Triton does not interpret in this process: set TRITON_INTERPRET=1 before Triton is imported" in done.stderr


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.8.0")
    monkeypatch.setattr(interpreter, "computes_bfloat16", lambda: False)
    with pytest.raises(
        KernelError, match=r"for the interpreter of triton 3\.7\.1, and this is 3\.8\.0: pip install triton==3\.7\.1"
    ):
        interpreter.install()


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test looks: with a rounding that truncates, it says so."""
    assert interpreter.computes_bfloat16()
    interpreter.self_test()
    monkeypatch.setattr(interpreter, "_round", interpreter._truncate)
    with pytest.raises(KernelError, match="rounding to nearest even"):
        interpreter.self_test()


@pytest.mark.parametrize(
    ("method", "operation"),
    [
        ("binary_op", "add"),
        ("cast_impl", "divide"),
        ("create_fp_to_fp", "rounding towards zero"),
        ("create_fma", "fma"),
        ("create_dot", "dot"),
    ],
)
def test_the_self_test_finds_a_method_that_is_not_replaced(
    method: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, method, getattr(_triton_as_it_comes(monkeypatch), method))
    with pytest.raises(KernelError, match=f"wrongly here: .*{operation}"):
        interpreter.self_test()


def _triton_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter's builder, loaded once more without the fix."""
    path = importlib.util.find_spec("triton.runtime.interpreter").origin  # type: ignore[union-attr]
    found = importlib.util.spec_from_file_location("triton.runtime.interpreter_as_it_comes", str(path))
    assert found is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, found.name, module)
    found.loader.exec_module(module)  # type: ignore[union-attr]
    return module.InterpreterBuilder


def test_an_atomic_on_bfloat16_is_refused_instead_of_computed_on_bits() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    value = TensorHandle(np.zeros(1, np.uint16), tl.bfloat16)
    with pytest.raises(NotImplementedError, match="atomics on bfloat16"):
        InterpreterBuilder().create_atomic_rmw(None, None, value)


def test_rounding_is_torchs_for_every_kind_of_number() -> None:
    bits = torch.cat(
        (torch.arange(-(2**31), 2**31, 65_521), torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F7FFFFF, 1]))
    ).int()
    values = bits.view(torch.float32)
    ours = torch.from_numpy(interpreter._round(values.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), values.isnan())
    assert torch.equal(ours[~values.isnan()], values[~values.isnan()].bfloat16())
    assert torch.equal(
        torch.from_numpy(interpreter._widen(ours.view(torch.int16).numpy().view("uint16"))).nan_to_num(),
        ours.float().nan_to_num(),
    )
