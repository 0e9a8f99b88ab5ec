"""The kernel benchmark's figures with an invented clock and known counts: every number that it prints, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import pytest
import torch

from weftrain.kernels import OPS, Implementation, KernelError, Spec
from weftrain.kernels.bench import measure
from weftrain.kernels.bench.clocks import Clock, Sample
from weftrain.kernels.bench.measure import COMPILED, bench, median_interval, roofline_ms, take_turns
from weftrain.kernels.bench.plot import bars
from weftrain.kernels.bench.roofline import Machine, Rate
from weftrain.kernels.bench.suites import examples_of
from weftrain.kernels.ops import _parts
from weftrain.kernels.ops._parts import Draw

KNOWN = Machine(
    Rate(1e12, "by hand", "FLOP"),
    Rate(1e10, "by hand", "B"),
    Rate(4e12, "sheet", "FLOP"),
    Rate(2e10, "sheet", "B"),
    4096,
    "by hand",
    "cpu",
)


def in_ms(*values: float) -> Clock:
    """A clock that runs what it is given and then says these durations, in turn; a quarter of one is its first part."""
    remaining = list(values)

    def clock(prepare: Callable[[], None], parts: Sequence[Callable[[], Any]], after: Callable[[], None]) -> Sample:
        prepare()
        for part in parts:
            part()
        after()
        ms = remaining.pop(0)
        return Sample((ms,) if len(parts) == 1 else (ms / 4, ms * 3 / 4))

    return clock


def catalog(**sources: Implementation) -> Callable[[], dict[str, dict[str, list[Implementation]]]]:
    return lambda: {"rms_norm": {name: [implementation] for name, implementation in sources.items()}}


def test_every_figure_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """rms_norm, x [3, 5, 77] and weight [77] in fp32: 1155 + 77 elements."""
    ours = Implementation("rms_norm", "ours", OPS["rms_norm"].function, version="ours 1.0")
    monkeypatch.setattr(measure, "load_catalog", catalog(ours=ours))
    # warm-up, forward; warm-up, forward + backward
    durations = [9.0] * 3 + [2.0, 1.0, 4.0] + [9.0] * 3 + [10.0, 20.0, 30.0]
    report = bench(["rms_norm"], ["ours"], "small", torch.float32, repeats=3, machine=KNOWN, clock=in_ms(*durations))
    forward, both, backward = report.measurements
    assert [one.direction for one in report.measurements] == ["forward", "forward+backward", "backward"]
    assert (forward.op, forward.example, forward.dtype) == ("rms_norm", "odd", "float32")
    assert (forward.source, forward.version) == ("ours", "ours 1.0")
    assert (forward.median_ms, forward.low_ms, forward.high_ms, forward.samples) == (2.0, 1.0, 4.0, 3)
    assert forward.confidence == 0.75  # the extremes of 3 samples
    assert forward.bytes == 4 * (1155 + 77 + 1155)
    assert forward.flops == 4 * 1155
    assert forward.gb_per_second == pytest.approx(9548 / 2e-3 / 1e9)
    assert forward.gflop_per_second == pytest.approx(4620 / 2e-3 / 1e9)
    assert forward.ideal_ms == pytest.approx(9548 / 1e10 * 1e3)
    assert forward.bound == "memory"
    assert forward.roofline_share == pytest.approx(9548 / 1e10 / 2e-3)
    assert forward.sourced_roofline_share == pytest.approx(9548 / 2e10 / 2e-3)
    assert both.bytes == 9548 + 4 * (3 * 1155 + 2 * 77)
    assert both.flops == 4620 + 9 * 1155
    assert both.median_ms == 20.0
    assert (backward.bytes, backward.flops) == (4 * (3 * 1155 + 2 * 77), 9 * 1155)
    assert (backward.low_ms, backward.median_ms, backward.high_ms) == (7.5, 15.0, 22.5)
    assert (forward.checked, both.checked) == (3, 3)
    assert forward.peak_bytes >= 4 * 1155, "the output at least"
    assert both.peak_bytes >= 4 * (2 * 1155 + 77)
    assert forward.copies == 2  # twice 4096 bytes of cache in copies of 4928
    assert forward.working_set_bytes == 2 * 4 * (1155 + 77)
    assert forward.beyond_cache
    assert forward.note == ""


def test_sources_take_turns_until_they_fail() -> None:
    seen: list[tuple[str, int]] = []

    def sample(name: str, number: int) -> bool:
        seen.append((name, number))
        return (name, number) != ("b", 1)

    take_turns("abc", 4, sample)
    order = "".join(name for name, _ in seen)
    assert order == "abcbcacab" + "abcbcacaac"  # 3 rounds of warm-up, then 4 that count, each beginning with another
    assert [number for name, number in seen if name == "a"] == [-3, -2, -1, 0, 1, 2, 3]


# rank: published tables of the sign test
@pytest.mark.parametrize(("n", "rank"), [(6, 1), (9, 2), (20, 6), (30, 10), (101, 41)])
def test_the_interval_is_that_of_order_statistics(n: int, rank: int) -> None:
    low, median, high, coverage = median_interval([float(i) for i in range(n, 0, -1)])
    assert (low, high) == (rank, n + 1 - rank)
    assert median == (n + 1) / 2
    assert coverage == pytest.approx(1 - 2 * sum(comb(n, i) for i in range(rank)) / 2**n)
    assert coverage >= 0.95
    assert 1 - 2 * sum(comb(n, i) for i in range(rank + 1)) / 2**n < 0.95  # the next pair would not do


def test_few_samples_say_what_they_are_worth() -> None:
    assert median_interval([5.0]) == (5.0, 5.0, 5.0, 0.0)
    assert median_interval([2.0, 1.0]) == (1.0, 1.5, 2.0, 0.5)


def test_the_roofline() -> None:
    ms, bound = roofline_ms(10**9, 10**9, Rate(1e12, "", "FLOP"), Rate(1e11, "", "B"))
    assert (ms, bound) == (pytest.approx(10.0), "memory")
    ms, bound = roofline_ms(10**6, 10**12, Rate(1e12, "", "FLOP"), Rate(1e11, "", "B"))
    assert (ms, bound) == (pytest.approx(1000.0), "compute")
    assert roofline_ms(1, 1, Rate(None, "", "FLOP"), Rate(1e11, "", "B")) == (None, None)
    assert roofline_ms(1, 1, Rate(1e12, "", "FLOP"), Rate(None, "", "B")) == (None, None)


def test_an_unknown_peak_is_unknown_in_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Implementation("rms_norm", "ours", OPS["rms_norm"].function)
    monkeypatch.setattr(measure, "load_catalog", catalog(ours=ours))
    unknown = replace(KNOWN, sourced_peak=Rate(None, "?", "FLOP"), sourced_bandwidth=Rate(None, "?", "B"))
    (forward, _, _) = bench(["rms_norm"], ["ours"], "small", torch.float32, repeats=1, machine=unknown).measurements
    assert forward.roofline_share is not None
    assert forward.sourced_roofline_share is None


@pytest.mark.parametrize(
    ("op", "bytes_moved", "flops"),
    [  # the "odd" example in fp32, counted by hand
        ("rms_norm", 4 * (3 * 1155 + 2 * 77), 9 * 1155),
        ("layer_norm", 4 * (3 * 1155 + 3 * 77), 13 * 1155),
        ("add_rms_norm", 4 * (5 * 1155 + 2 * 77), 10 * 1155),
        ("add_layer_norm", 4 * (5 * 1155 + 3 * 77), 14 * 1155),
        ("rope", 4 * (2 * 2 * 2 * 13 * 3 * 20 + 2 * 13 * 6), 2 * 3 * 2 * 13 * 3 * 12),
        ("swiglu", 4 * 5 * 15 * 77, 11 * 15 * 77),
        ("attention", 4 * 8 * 2 * 63 * 3 * 20, 10 * 2 * 3 * (63 * 64 // 2) * 20),
        ("cross_entropy", 4 * 2 * 29 * 101 + 8 * 29 + 4 * 29, 4 * 29 * 101),
        ("linear_cross_entropy", 4 * 2 * (29 * 24 + 101 * 24) + 8 * 29, 29 * 101 * (4 * 24 + 4)),
    ],
)
def test_backward_costs(op: str, bytes_moved: int, flops: int) -> None:
    cost = OPS[op].backward_cost
    assert cost is not None
    assert cost(OPS[op].examples["odd"]("cpu", torch.float32)) == (bytes_moved, flops)


def test_an_op_with_gradients_must_state_what_its_backward_costs() -> None:
    assert [op.name for op in OPS.values() if op.backward_cost is None] == ["adamw", "grad_norm", "newton_schulz"]
    with pytest.raises(KernelError, match="rope: has gradients and no backward_cost"):
        replace(OPS["rope"], backward_cost=None)


def test_an_interpreted_kernel_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Implementation("rms_norm", "triton", OPS["rms_norm"].function, version="triton 3.7.1, interpreted")
    monkeypatch.setattr(measure, "load_catalog", catalog(triton=slow))
    report = bench(["rms_norm"], ["triton"], "small", torch.float32, repeats=1, machine=KNOWN)
    assert {one.note for one in report.measurements} == {"plumbing only"}
    assert {one.roofline_share for one in report.measurements} == {None}
    assert bars(report) == {}


def test_what_is_unavailable_or_fails_is_said_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Any, weight: Any, *, eps: float) -> Any:
        raise RuntimeError("no kernel image\nsecond line")

    def needs_77(spec: Spec) -> str | None:
        return f"not for hidden_size {spec.attributes['hidden_size']}"

    sources = {
        "reference": Implementation("rms_norm", "reference", OPS["rms_norm"].function),
        "broken": Implementation("rms_norm", "broken", fails),
        "picky": Implementation("rms_norm", "picky", fails, needs_77),
    }
    monkeypatch.setattr(measure, "load_catalog", catalog(**sources))
    report = bench(["rms_norm", "grad_norm"], list(sources), "70m", torch.float32, repeats=1, machine=KNOWN)
    assert {(item.op, item.reason) for item in report.skipped} >= {
        ("grad_norm", "kernels/ops/grad_norm.py has no example of suite 70m")
    }
    report = bench(["rms_norm"], list(sources), "small", torch.float32, repeats=1, machine=KNOWN)
    assert {one.source for one in report.measurements} == {"reference"}
    reasons = {item.source: item.reason for item in report.skipped}
    assert reasons["picky"] == "not for hidden_size 77"
    assert reasons["broken"] == "forward+backward: RuntimeError: no kernel image"


def test_unknown_names_are_errors() -> None:
    for arguments, message in (
        ((["rms"],), "there is no op 'rms'; there is: rms_norm"),
        ((None, ["torhc"]), "there is no source 'torhc'; there is: .*torch.compile"),
        ((None, None, "9b"), "there is no suite '9b'; there is: small, 70m, 7b, 7b_16k"),
    ):
        with pytest.raises(KernelError, match=message):
            bench(*arguments, machine=KNOWN)  # type: ignore[arg-type]


def test_the_7b_suite_is_amber_crystalcoder_and_olmoe() -> None:
    for op in OPS.values():
        names = examples_of(op, "7b")
        assert names, f"{op.name} has no 7B shape"
        assert all(name.startswith(("amber_7b", "crystalcoder_7b", "olmoe_1b_7b")) for name in names)
        long = examples_of(op, "7b_16k")
        without_tokens = op.backward_cost is None
        assert long == (names if without_tokens else [f"{name}_16k" for name in names if f"{name}_16k" in op.examples])
        assert len(long) == len(names)


def test_the_16k_examples_are_of_16384_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draw, "normal", lambda self, *shape, std=1.0, dtype=None: torch.empty(shape, device="meta"))
    monkeypatch.setattr(Draw, "labels", lambda self, rows, vocab: torch.empty(rows, device="meta"))
    for op in OPS.values():
        for name in [name for name in examples_of(op, "7b_16k") if name.endswith("_16k")]:
            first = next(iter(op.examples[name]("cpu", torch.bfloat16).values()))
            tokens = first.shape[:2] if op.name in ("attention", "rope") else first.shape[:1]
            each = 8 if op.name == "grouped_gemm" else 1  # rows of a token: one for each of its experts
            assert tokens.numel() == 16384 * each, (op.name, name)


def test_large_examples_repeat_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Draw("cpu", torch.float32).normal(10)
    monkeypatch.setattr(_parts, "_MOST_DRAWN", 10)
    assert torch.equal(Draw("cpu", torch.float32).normal(5, 5), small.repeat(3)[:25].view(5, 5))


@pytest.mark.prove
def test_torch_eager_and_torch_compile_stand_beside_the_others() -> None:
    report = bench(["grad_norm"], ["reference", COMPILED, "torch"], "small", torch.float32, repeats=1, machine=KNOWN)
    assert [one.source for one in report.measurements] == ["reference", "torch", COMPILED]


def test_sdpa_is_timed_on_a_cpu_and_cannot_be_chosen_there() -> None:
    report = bench(["attention"], ["sdpa"], "small", torch.float32, repeats=1, machine=KNOWN)
    assert {(one.source, one.note) for one in report.measurements} == {("sdpa", "comparison only")}


def test_json_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench(["swiglu"], ["reference"], "small", torch.float32, repeats=1, machine=KNOWN)
    document = json.loads(report.to_json())
    assert document["schema_version"] == 2
    env = document["environment"]
    assert (env["threads"], env["dtype"], env["suite"]) == (torch.get_num_threads(), "float32", "small")
    assert (env["measured_peak_gflop_per_second"], env["measured_bandwidth_gb_per_second"]) == (1000.0, 10.0)
    assert env["sourced_peak_gflop_per_second"] == 4000.0
    assert document["measurements"][0]["op"] == "swiglu"
    assert len(document["measurements"]) == 3


def test_both_ends_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter(
        [
            KNOWN,
            Machine(
                Rate(3e12, "later", "FLOP"),
                KNOWN.measured_bandwidth,
                KNOWN.sourced_peak,
                KNOWN.sourced_bandwidth,
                4096,
                "",
                "cpu",
            ),
        ]
    )
    monkeypatch.setattr(measure, "measure_machine", lambda *_: next(ends))
    report = bench(["swiglu"], ["reference"], "small", torch.float32, repeats=1)
    assert report.environment["measured_peak_origin"] == "later"


def test_a_limit_that_was_beaten_is_no_limit() -> None:
    """A peak that was measured on a busy machine, or data that lay in the cache: no share above 100 % of it."""
    from weftrain.kernels.bench.measure import _share

    assert (_share(1.0, 2.0), _share(2.0, 2.0), _share(2.001, 2.0), _share(None, 2.0)) == (0.5, 1.0, None, None)
