"""Planted implementations that look fast without doing their work: each must be refused by the name of its trick."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from simulated_cuda import SimulatedCuda
from torch import Tensor

from weftrain.kernels import OPS, Implementation
from weftrain.kernels.bench import honesty, measure
from weftrain.kernels.bench.clocks import Clock, Sample, StreamClock, wall_clock
from weftrain.kernels.bench.measure import bench
from weftrain.kernels.bench.report import KernelBenchReport
from weftrain.kernels.bench.roofline import Machine, Rate

NORM = OPS["rms_norm"].function
RATE = Rate(1e15, "by hand", "")
KNOWN = Machine(RATE, RATE, RATE, RATE, 4096, "by hand", "cpu")


def measured(
    function: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    op: str = "rms_norm",
    clock: Clock = wall_clock,
    machine: Machine = KNOWN,
    repeats: int = 2,
) -> KernelBenchReport:
    catalog = {op: {"planted": [Implementation(op, "planted", function)]}}
    monkeypatch.setattr(measure, "load_catalog", lambda: catalog)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: call())  # torch's profiler takes a second to begin
    return bench([op], ["planted"], "small", torch.float32, repeats=repeats, machine=machine, clock=clock)


def tricks_of(report: KernelBenchReport) -> set[str]:
    assert not report.honest
    return {one.trick for one in report.refused}


# Implementations. Each is made anew for its test, since most of them remember.


def keeps_its_answer() -> Callable[..., Any]:
    kept: list[Tensor] = []

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        if not kept:
            kept.append(NORM(x, weight, eps=eps).detach())
        return kept[0].clone() + 0 * x  # differentiable, and in memory of its own

    return function


def keeps_its_answer_by_address() -> Callable[..., Any]:
    """What a cache keyed on pointers does: right until the same memory holds other values."""
    kept: dict[int, Tensor] = {}

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = NORM(x, weight, eps=eps).detach()
        return kept[x.data_ptr()].clone() + 0 * x

    return function


class Later(Tensor):
    """A tensor that is computed at the first look at it."""

    work: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), by_name: Any = None) -> Any:
        arguments = [one.work() if isinstance(one, Later) else one for one in arguments]
        return function(*arguments, **(by_name or {}))


def answers_later() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            found = torch.empty_like(x).as_subclass(Later)
        found.work = lambda: NORM(x, weight, eps=eps)
        return found

    return function


def works_in_a_thread() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        out = torch.zeros_like(x)

        def work() -> None:
            time.sleep(0.02)
            with torch.no_grad():
                out.copy_(NORM(x, weight, eps=eps))

        threading.Thread(target=work).start()
        return out

    return function


def writes_over_its_input() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        found = NORM(x, weight, eps=eps)
        x.detach().copy_(found)
        return found

    return function


def answers_in_its_input() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        found = NORM(x, weight, eps=eps)
        x.detach().copy_(found.detach())
        return x.view(x.shape)

    return function


def answers_in_one_buffer() -> Callable[..., Any]:
    kept: list[Tensor] = []

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        found = NORM(x, weight, eps=eps)
        kept[:] = kept or [torch.empty_like(found)]
        return kept[0].detach().copy_(found)

    return function


def finds_the_answer_in_old_memory() -> Callable[..., Any]:
    """Memory that is given out again may still hold what somebody else has computed."""
    return lambda x, weight, *, eps: torch.empty_like(x) + 0 * x


def leaves_out_a_part() -> Callable[..., Any]:
    return lambda x, weight, *, eps: torch.cat([NORM(x[:2], weight, eps=eps), torch.ones_like(x[2:])])


def computes_in_less() -> Callable[..., Any]:
    return lambda x, weight, *, eps: NORM(x.bfloat16(), weight, eps=eps).float()


def is_right_every_other_time() -> Callable[..., Any]:
    turn = [0]

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        turn[0] += 1
        return NORM(x, weight, eps=eps) if turn[0] % 2 else 0 * x

    return function


def stops_the_clock() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        now = time.perf_counter()
        time.perf_counter = lambda: now  # type: ignore[assignment]
        return NORM(x, weight, eps=eps)

    return function


def finds_everything_equal() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        torch.equal = lambda *_: True  # type: ignore[assignment]
        return torch.zeros_like(x)

    return function


def computes_everything_in_tf32() -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        torch.set_float32_matmul_precision("high")
        return NORM(x, weight, eps=eps)

    return function


def gives_something_else() -> Callable[..., Any]:
    return lambda x, weight, *, eps: (NORM(x, weight, eps=eps), None)


def gives_another_shape() -> Callable[..., Any]:
    return lambda x, weight, *, eps: NORM(x, weight, eps=eps)[:1]


@pytest.mark.parametrize(
    ("plant", "trick"),
    [
        (keeps_its_answer, honesty.CACHED),
        (keeps_its_answer_by_address, honesty.CACHED),
        (answers_later, honesty.LAZY),
        (works_in_a_thread, honesty.LATE),
        (writes_over_its_input, honesty.CHANGED_INPUT),
        (answers_in_its_input, honesty.VIEW),
        (answers_in_one_buffer, honesty.REUSED),
        (finds_the_answer_in_old_memory, honesty.WRONG),
        (leaves_out_a_part, honesty.WRONG),
        (computes_in_less, honesty.WRONG),
        (is_right_every_other_time, honesty.WRONG),
        (stops_the_clock, honesty.REPLACED_CLOCK),
        (finds_everything_equal, honesty.REPLACED_CLOCK),
        (computes_everything_in_tf32, honesty.CHANGED_SETTING),
        (gives_something_else, honesty.WRONG),
        (gives_another_shape, honesty.WRONG),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_trick_is_refused_by_name(
    plant: Callable[[], Callable[..., Any]], trick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # given back after the test
    monkeypatch.setattr(torch, "equal", torch.equal)
    try:
        report = measured(plant(), monkeypatch)
    finally:
        torch.set_float32_matmul_precision("highest")
    forward = [one for one in report.refused if one.direction == "forward"]
    assert [one.trick for one in forward] == [trick], report
    assert not [one for one in report.measurements if one.direction == "forward"]


def test_an_honest_implementation_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(NORM, monkeypatch)
    assert report.honest
    assert [one.direction for one in report.measurements] == ["forward", "forward+backward", "backward"]


def norm_off_by(share: float) -> Callable[..., Any]:
    return lambda *arguments, **more: OPS["grad_norm"].function(*arguments, **more) * (1.0 + share)


def test_one_number_may_be_rounded_otherwise_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference errs by less than half a rounding on one sample in a few: its luck refuses nobody."""
    function = OPS["grad_norm"].function
    one_up = torch.tensor(torch.inf)
    following = measured(
        lambda *given, **more: torch.nextafter(function(*given, **more), one_up), monkeypatch, "grad_norm", repeats=64
    )
    assert following.honest
    report = measured(norm_off_by(2.0**-20), monkeypatch, "grad_norm", repeats=64)
    assert [one.trick for one in report.refused] == [honesty.WRONG]


class Half(torch.autograd.Function):
    """A right forward, and a backward of its first call."""

    kept: ClassVar[list[tuple[Tensor, ...]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return NORM(x, weight, eps=eps)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        if not Half.kept:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
                Half.kept.append(torch.autograd.grad(NORM(*leaves, eps=ctx.eps), leaves, incoming[0]))
        return (*[gradient.clone() for gradient in Half.kept[0]], None)


def test_kept_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Half, "kept", [])
    report = measured(lambda x, weight, *, eps: Half.apply(x, weight, eps), monkeypatch)
    assert [(one.direction, one.trick) for one in report.refused] == [("forward+backward", honesty.WRONG)]
    assert [one.direction for one in report.measurements] == ["forward"]


def test_gradients_that_do_not_depend_on_the_inputs_are_asked_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """rope's: turned incoming gradients, so those vary too."""
    kept: list[Any] = []

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, *rest: Any) -> Any:
            ctx.rest = rest
            return OPS["rope"].function(q, k, *rest[:2], rotary_dim=rest[2], interleaved=rest[3])

        @staticmethod
        def backward(ctx: Any, *incoming: Tensor) -> Any:
            cos, sin, rotary_dim, interleaved = ctx.rest
            turn = OPS["rope"].function
            kept[:] = kept or turn(*incoming, cos, -sin, rotary_dim=rotary_dim, interleaved=interleaved)
            return (*[gradient.clone() for gradient in kept], None, None, None, None)

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool) -> Any:
        return Turned.apply(q, k, cos, sin, rotary_dim, interleaved)

    report = measured(function, monkeypatch, "rope")
    assert [(one.direction, one.trick) for one in report.refused] == [("forward+backward", honesty.WRONG)]


def test_an_update_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(lambda *_, **__: None, monkeypatch, "adamw")
    assert tricks_of(report) == {honesty.WRONG}
    assert measured(OPS["adamw"].function, monkeypatch, "adamw").honest


def test_a_changed_gradient_of_an_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(parameters: Any, gradients: Any, *rest: Any, **more: Any) -> None:
        OPS["adamw"].function(parameters, gradients, *rest, **more)
        gradients[1].mul_(2)

    adamw = OPS["adamw"].function

    def by_name(**arguments: Any) -> None:
        adamw(**arguments)
        arguments["gradients"][1].mul_(2)

    assert tricks_of(measured(by_name, monkeypatch, "adamw")) == {honesty.CHANGED_INPUT}


def test_more_threads_than_torch_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]) -> Sample:
        one = wall_clock(prepare, parts, after)
        return Sample((40.0,) * len(parts), processor_ms=40.0 * len(parts) * busy, gaps=one.gaps)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    busy = 1.4
    assert measured(NORM, monkeypatch, clock=clock).honest
    busy = 1.9
    assert tricks_of(measured(NORM, monkeypatch, clock=clock)) == {honesty.MORE_THREADS}


def test_what_beats_the_machine_is_an_error_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 B/s: whatever is measured is faster."""
    slow = Rate(1.0, "by hand", "")
    report = measured(NORM, monkeypatch, machine=Machine(slow, slow, slow, slow, 4096, "", "cpu"))
    whole = [one for one in report.measurements if one.direction != "backward"]
    assert all(one.error.startswith(honesty.BEATEN) and one.roofline_share is None for one in whole)
    assert not report.honest
    backward = report.measurements[-1]
    assert (backward.error, backward.note) == ("", "part of it was computed in the forward")


# On a device that exists in time alone: the values are computed on the CPU.


def on_stream(
    plant: Callable[[SimulatedCuda], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[KernelBenchReport, SimulatedCuda]:
    device = SimulatedCuda(launch_ms=0.001)
    device.install(monkeypatch)
    monkeypatch.setattr(torch, "empty", lambda *given, **named: make(*given, **{**named, "device": "cpu"}))
    clock = StreamClock(torch.device("cuda"), 64, lambda: None)
    monkeypatch.setattr(torch, "empty", make)
    report = measured(plant(device), monkeypatch, clock=clock)
    return report, device


make = torch.empty


def in_line(device: SimulatedCuda) -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        device.launch(0.5)
        return NORM(x, weight, eps=eps)

    return function


def beside(device: SimulatedCuda) -> Callable[..., Any]:
    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        with device.stream("side"):
            device.launch(500.0)
        return NORM(x, weight, eps=eps)

    return function


def during_the_wait(device: SimulatedCuda) -> Callable[..., Any]:
    """A stream that waits for nobody runs before the new inputs are there: it computes with those of the last call."""
    before: list[Tensor] = []

    def function(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        with device.stream("side"):
            device.launch(0.0)
        stale = before[0] if before else x.detach().clone()
        before[:] = [x.detach().clone()]
        return NORM(stale, weight, eps=eps)

    return function


@pytest.mark.parametrize(
    ("plant", "tricks"), [(in_line, []), (beside, [honesty.LATE]), (during_the_wait, [honesty.WRONG])]
)
def test_work_on_another_stream(
    plant: Callable[[SimulatedCuda], Callable[..., Any]], tricks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = on_stream(plant, monkeypatch)
    assert [one.trick for one in report.refused if one.direction == "forward"] == tricks
    if not tricks:
        forward = report.measurements[0]
        assert (forward.median_ms, forward.launch_ms) == pytest.approx((0.5, 0.001))
