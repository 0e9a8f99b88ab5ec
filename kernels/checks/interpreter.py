"""A fix of Triton's interpreter for checks: version 3.7.1 adds and multiplies the *bit patterns* of bfloat16.

`install` replaces private methods of this exact version, so any other is refused, and tests the result by running
kernels. One operation is done in fp32 and rounded once to nearest even. A sum or a dot of bf16 is
therefore rounded once, whereas a GPU that accumulates in bf16 rounds at every step: the interpreter cannot show that
error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from weftrain.kernels.contract import KernelError

TRITON_VERSION = "3.7.1"
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def computes_bfloat16() -> bool:
    """True where `install` has been called in this process. Imports nothing."""
    module = sys.modules.get("triton.runtime.interpreter")
    return module is not None and module.InterpreterBuilder.binary_op.__module__ == __name__


def install() -> None:
    """Replace the interpreter's arithmetic on bfloat16 and test the result; a second call does nothing.

    Raises KernelError: another Triton than 3.7.1, a process whose Triton does not interpret, or a wrong result of the
    self-test.
    """
    if computes_bfloat16():
        return
    try:
        import triton
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError as error:
        raise KernelError(f"the bfloat16 fix of Triton's interpreter needs triton {TRITON_VERSION}: {error}") from error
    if triton.__version__ != TRITON_VERSION:
        raise KernelError(
            f"the bfloat16 fix is for the interpreter of triton {TRITON_VERSION}, and this is {triton.__version__}: "
            "pip install "
            f"triton=={TRITON_VERSION}"
        )
    if not triton.knobs.runtime.interpret:
        raise KernelError("Triton does not interpret in this process: set TRITON_INTERPRET=1 before Triton is imported")
    _patch_builder(interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._get_np_dtype, tl)
    _widen_methods(interpreter.InterpreterBuilder, interpreter.TensorHandle, tl)
    _patch_reductions(interpreter.ReduceScanOpInterface, interpreter.TensorHandle, tl)
    self_test()


def self_test() -> None:
    """Compare small bf16 kernels with torch's fp32 arithmetic, rounded once. Raises KernelError if bits differ."""
    from weftrain.kernels.checks._interpreter_kernels import wrong_results

    wrong = wrong_results()
    if wrong:
        raise KernelError(
            f"Triton's interpreter computes bfloat16 wrongly here: {', '.join(wrong)}; its results would mean nothing"
        )


# ---- bits


def _widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> fp32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """Any numbers -> uint16 bit patterns of bfloat16, to nearest even; NaN stays NaN."""
    values = np.asarray(values).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _truncate(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 bit patterns of bfloat16, towards zero."""
    values = np.ascontiguousarray(np.asarray(values).astype(np.float32))
    return np.where(np.isnan(values), np.uint16(0x7FC0), (values.view(np.uint32) >> 16).astype(np.uint16))


# ---- the replacements


def _is_bfloat16(operand: Any, tl: Any) -> bool:
    return bool(operand.dtype.scalar == tl.bfloat16 and operand.data.dtype == np.uint16)


def _patch_builder(builder: Any, handle: Any, numpy_dtype: Callable[[Any], Any], tl: Any) -> None:
    """The methods of the interpreter's builder that compute and have rules of their own: operands widened, the result
    rounded where it is bfloat16. `_widen_methods` does the others.
    """
    originals = {
        name: getattr(builder, name) for name in ("binary_op", "cast_impl", "create_fp_to_fp", "create_atomic_rmw")
    }

    def is_bf16(operand: Any) -> bool:
        return _is_bfloat16(operand, tl)

    def values(operand: Any) -> np.ndarray:
        return _widen(operand.data) if is_bf16(operand) else operand.data

    def result(data: np.ndarray, dtype: Any) -> Any:
        return handle(_round(data) if dtype == tl.bfloat16 else data, dtype)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (is_bf16(lhs) or is_bf16(rhs)):
            return originals["binary_op"](self, lhs, rhs, op)
        data = op(values(lhs), values(rhs))
        return handle(data, tl.int1) if op in _COMPARISONS else result(data, lhs.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to_bf16 = dst_type.scalar == tl.bfloat16
        if not (to_bf16 or is_bf16(src)):
            return originals["cast_impl"](self, src, dst_type)
        return (
            result(values(src), tl.bfloat16)
            if to_bf16
            else handle(values(src).astype(numpy_dtype(dst_type)), dst_type.scalar)
        )

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        from triton._C.libtriton import ir

        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            rounding = _truncate if rounding_mode == ir.ROUNDING_MODE.RTZ else _round
            return handle(rounding(src.data), tl.bfloat16)
        return originals["create_fp_to_fp"](self, src, dst_type, rounding_mode)

    def create_atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if is_bf16(value):
            raise NotImplementedError("atomics on bfloat16 are not computed by the interpreter")
        return originals["create_atomic_rmw"](self, operation, pointer, value, *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(_round(np.array([value])), tl.bfloat16)

    for function in (binary_op, cast_impl, create_fp_to_fp, create_atomic_rmw, get_bf16):
        setattr(builder, function.__name__, function)


def _widen_methods(builder: Any, handle: Any, tl: Any) -> None:
    """fma and dot need no more than operands in fp32; their result has the dtype of the last operand.

    The language itself takes exp, sqrt, erf and the like in fp32 alone, and clamps in fp32.
    """

    def widened(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *operands: Any, **rest: Any) -> Any:
            tensors, others = operands[:3], operands[3:]
            narrow = [_is_bfloat16(tensor, tl) for tensor in tensors]
            if not any(narrow):
                return method(self, *operands, **rest)
            wide = [
                handle(_widen(tensor.data), tl.float32) if is_narrow else tensor
                for tensor, is_narrow in zip(tensors, narrow, strict=True)
            ]
            data, dtype = method(self, *wide, *others, **rest).data, tensors[-1].dtype.scalar
            return handle(_round(data) if dtype == tl.bfloat16 else data, dtype)

        return call

    for name in ("create_fma", "create_dot"):
        setattr(builder, name, widened(getattr(builder, name)))


def _patch_reductions(interface: Any, handle: Any, tl: Any) -> None:
    """tl.reduce and tl.associative_scan: inputs widened, each result rounded where its input was bfloat16."""
    original = interface.apply

    def apply(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tuple):
            return self.apply((operands,))[0]
        narrow = [isinstance(tensor, tl.core.tensor) and tensor.dtype == tl.bfloat16 for tensor in operands]
        if not any(narrow):
            return original(self, operands)
        wide = tuple(
            tl.core.tensor(handle(_widen(t.handle.data), tl.float32), t.type.with_element_ty(tl.float32))
            if is_narrow
            else t
            for t, is_narrow in zip(operands, narrow, strict=True)
        )
        results = []
        for tensor, is_narrow in zip(original(self, wide), narrow, strict=True):
            if is_narrow:
                kind = tensor.type.with_element_ty(tl.bfloat16) if tensor.type.is_block() else tl.bfloat16
                tensor = tl.core.tensor(handle(_round(tensor.handle.data), tl.bfloat16), kind)
            results.append(tensor)
        return tuple(results)

    interface.apply = apply
