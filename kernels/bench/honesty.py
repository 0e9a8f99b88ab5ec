"""Whether a timed call did its work: every way to look fast that is known here has a name, and is refused by it.

What was returned is copied in the stream of the call, before anything is waited for: so it is judged as the next kernel
would have seen it. It is compared with float64 within the tolerance of `weftrain kernels check` (half-precision calls
on large tensors with the reference in fp32, which is far below their tolerance).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.bench.clocks import Sample
from weftrain.kernels.bench.inputs import Inputs
from weftrain.kernels.checks.evaluation import (
    Results,
    evaluate,
    exact_arguments,
    gradients_of,
    map_tensors,
    outputs_of,
)
from weftrain.kernels.checks.numerics import bound
from weftrain.kernels.contract import Arguments, KernelError, Op

CACHED = "cached output"  # the answer to earlier inputs
LAZY = "lazy output"  # a tensor that is computed when somebody looks at it
LATE = "work after the return"  # on another stream or thread, which nobody has waited for
CHANGED_INPUT = "input changed"  # in place, though the op does not say so
VIEW = "view of an input"  # an output in an input's memory
REUSED = "reused output"  # an output in the memory of the one before, which its owner may still need
WRONG = "wrong result"
REPLACED_CLOCK = "replaced clock"
CHANGED_SETTING = "setting changed"  # of torch: for everybody, and for what is measured next
MORE_THREADS = "more threads than asked"
BEATEN = "faster than the measured limit"  # of this machine: something was not done, or not counted

LARGE = 2**18  # elements of all arguments: beyond, a float64 result takes longer than the measurement
# What is allowed however little the reference errs on this sample, whose values nobody has chosen: of large tensors,
# whose fp32 sums are taken in another order, and of small ones, whose error one element can make (two fp32 roundings).
_LEAST_ALLOWED, _LEAST_ALLOWED_SMALL = 1e-5, 2.0**-22
_EQUAL = torch.equal  # bound before a kernel is called
_LATE_MS, _LATE_SHARE = 0.05, 0.1  # what a device may go on after the call's stream: the cost of asking
_PATIENCE_S = 0.25  # how long a wrong result is watched for work that goes on


class Refused(KernelError):  # noqa: N818 (an answer, not a failure of this program)
    """The implementation is not measured. trick: its name above."""

    def __init__(self, trick: str, detail: str) -> None:
        super().__init__(f"{trick}: {detail}")
        self.trick, self.detail = trick, detail


class Returned:
    """What one sample gave: by name the tensors themselves, and copies taken in the stream of the call."""

    def __init__(self, op: Op, returned: Any, gradients: Iterable[Tensor]) -> None:
        outputs = () if op.in_place else (returned,) if isinstance(returned, Tensor) else tuple(returned or ())
        if not op.in_place and (len(outputs) != len(op.outputs) or not all(isinstance(o, Tensor) for o in outputs)):
            raise Refused(WRONG, f"{type(returned).__name__} was returned, and the op gives {', '.join(op.outputs)}")
        self.outputs: dict[str, Tensor] = dict(zip(() if op.in_place else op.outputs, outputs, strict=True))
        self.gradients = {f"grad_{name}": tensor for name, tensor in zip(op.differentiable, gradients, strict=False)}
        self.copies = {name: tensor.detach().clone() for name, tensor in {**self.outputs, **self.gradients}.items()}

    def still(self) -> bool:
        """Whether the tensors still hold what they held when the call was over."""
        now = {**self.outputs, **self.gradients}
        return all(_equal(now[name], self.copies[name]) for name in self.copies)


class Judge:
    """Looks at the samples of one op, example and direction."""

    def __init__(self, op: Op, dtype: torch.dtype, inputs: Inputs) -> None:
        self._op, self._dtype, self._inputs = op, dtype, inputs
        self._last: dict[str, Returned] = {}  # of each source; alive, so that its memory is not given out again
        self._measuring, self._settings = _measuring(), _settings()

    def look(self, source: str, copy: int, sample: Sample, returned: Returned, checked: bool) -> None:
        """Raises Refused. checked: compare the results with the truth as well."""
        self._check_clock()
        self._check_kind(returned)
        self._check_memory(source, copy, returned)
        if sample.late_ms > _LATE_MS + _LATE_SHARE * sample.ms:
            raise Refused(LATE, f"the device went on for {sample.late_ms:.3g} ms after the stream of the call was done")
        if (name := self._inputs.changed(copy)) is not None:
            raise Refused(CHANGED_INPUT, f"{name} has other values after the call")
        last = self._last.get(source)
        if last is not None and last.copies and all(_equal(returned.copies[n], last.copies[n]) for n in last.copies):
            raise Refused(CACHED, "the results of two samples with different inputs are the same")
        if checked and (fault := self._fault(copy, returned)):
            self._watch(returned)
            raise Refused(WRONG, fault)
        if not returned.still():
            raise Refused(LATE, "the results changed after the call was over")
        self._last[source] = returned

    def _check_clock(self) -> None:
        if not isinstance(time.perf_counter, BuiltinFunctionType) or _measuring() != self._measuring:
            raise Refused(REPLACED_CLOCK, "the functions that measure and compare are others than before the call")
        if _settings() != self._settings:
            changed = [name for name, value in _settings().items() if value != self._settings[name]]
            raise Refused(CHANGED_SETTING, f"the call has changed {', '.join(changed)} for everything that follows")

    def _check_kind(self, returned: Returned) -> None:
        for name, tensor in {**returned.outputs, **returned.gradients}.items():
            if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
                raise Refused(LAZY, f"{name} is no plain tensor whose values are in memory ({type(tensor).__name__})")

    def _check_memory(self, source: str, copy: int, returned: Returned) -> None:
        mine, last = self._inputs.storages(copy), self._last.get(source)
        before = {} if last is None else {_storage(tensor): name for name, tensor in last.outputs.items()}
        for name, tensor in returned.outputs.items():
            if not tensor.numel():
                continue
            if _storage(tensor) in mine:
                raise Refused(VIEW, f"{name} lies in the memory of {mine[_storage(tensor)]}")
            if _storage(tensor) in before:
                raise Refused(REUSED, f"{name} lies in the memory of the call before's {before[_storage(tensor)]}")

    def _watch(self, returned: Returned) -> None:
        """Whether a wrong result becomes another one by itself."""
        end = time.monotonic() + _PATIENCE_S
        while returned.copies and time.monotonic() < end:
            if not returned.still():
                raise Refused(LATE, "the results changed after the call was over")
            time.sleep(0.01)

    def _fault(self, copy: int, returned: Returned) -> str | None:
        """How the results differ from the truth, or None."""
        op = self._op
        arguments, incoming = self._inputs.original(copy)
        given = incoming if returned.gradients else []
        if not op.in_place:
            return self._compare(returned.copies, arguments, given)
        held, lengths = self._inputs.held(copy), {len(v) for v in arguments.values() if isinstance(v, (list, tuple))}
        for index in range(max(lengths)):  # one tensor after the other: a layer of them in float64 would not fit
            one = {n: [v[index]] if isinstance(v, (list, tuple)) else v for n, v in arguments.items()}
            got = {n: held[n][index].flatten() for n in op.in_place if held[n] is not None}
            if fault := self._compare(got, one, []):
                return fault
        return None

    def _compare(self, got: Mapping[str, Tensor], arguments: Arguments, incoming: list[Tensor]) -> str | None:
        op = self._op
        large = sum(tensor.numel() for tensor in _tensors(arguments)) > LARGE
        wanted = op.differentiable if incoming else ()
        like = _evaluated(op, op.function, arguments, incoming, wanted)
        if large:
            wide = _widened(arguments)
            truth = _evaluated(op, op.function, wide, [gradient.float() for gradient in incoming], wanted)
        else:
            doubles = [gradient.cpu().double() for gradient in incoming]
            truth = _evaluated(op, op.exact, exact_arguments(arguments), doubles, wanted)
        for name, reference in like.items():
            found = got.get(name)
            if found is None or found.shape != reference.shape or found.dtype != reference.dtype:
                shape = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                return f"{name} is {shape}, and the reference's {reference.dtype} {list(reference.shape)}"
            if name not in truth or name == "copies":
                continue  # rounded parameters, compared below
            allowed, _ = bound(op, name, reference, _distance(reference, truth[name]), self._dtype)
            allowed = max(allowed, _LEAST_ALLOWED if large else _LEAST_ALLOWED_SMALL)
            if not (error := _distance(found, truth[name])) <= allowed:
                return f"{name} errs by {error:.1e}, and {allowed:.1e} is allowed"
        if "copies" in got and not torch.equal(got["copies"], got["parameters"].to(got["copies"].dtype)):
            return "copies are not the new parameters rounded to nearest"
        return None


def _measuring() -> tuple[Any, ...]:
    """What samples are taken and looked at with."""
    cuda, tensor = torch.cuda, Tensor
    return (cuda.Event, cuda.synchronize, cuda._sleep, torch.autograd.grad, torch.equal, tensor.clone, tensor.detach)


def _settings() -> dict[str, Any]:
    """What makes every later call faster, or less exact."""
    return {
        "the number of threads": torch.get_num_threads(),
        "the default dtype": torch.get_default_dtype(),
        "the precision of fp32 products": torch.get_float32_matmul_precision(),
        "cuDNN's TF32": torch.backends.cudnn.allow_tf32,
        "how bf16 products are summed": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def check_threads(samples: Iterable[Sample], threads: int) -> None:
    """Raises Refused for a source whose calls, on a CPU, kept more processors busy than torch was given."""
    known = [sample for sample in samples if sample.processor_ms is not None]
    wall, spent = sum(sample.ms for sample in known), sum(sample.processor_ms or 0.0 for sample in known)
    if wall > 50.0 and spent / wall > threads + 0.5:
        raise Refused(MORE_THREADS, f"{spent / wall:.1f} processors were busy, and {threads} threads are measured")


def _evaluated(op: Op, function: Any, arguments: Arguments, incoming: list[Tensor], wanted: tuple[str, ...]) -> Results:
    """Outputs and the gradients of `wanted`, or what an op updates in place."""
    with torch.enable_grad():
        if op.in_place:
            return evaluate(op, function, arguments)
        leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
        outputs = outputs_of(op, function(**{**arguments, **leaves}))
        results = {name: output.detach() for name, output in outputs.items()}
        return results | (gradients_of(leaves, outputs, incoming) if leaves else {})


def _widened(arguments: Arguments) -> Arguments:
    wide = map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, arguments)
    return {name: torch.float32 if isinstance(value, torch.dtype) else value for name, value in wide.items()}


def _distance(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error, taken where the tensors are."""
    got = got.detach().to(truth.device)
    square = size = 0.0
    for mine, true in zip(got.flatten().split(_PIECE), truth.flatten().split(_PIECE), strict=True):
        square += float((mine.double() - true.double()).square().sum())
        size += float(true.double().square().sum())
    found = square**0.5 / max(size**0.5, 1e-6)
    return found if found == found else float("inf")


_PIECE = 2**24


def _tensors(arguments: Arguments) -> Iterable[Tensor]:
    for value in arguments.values():
        yield from (
            item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Tensor)
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same values, NaN equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return _EQUAL(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
