"""Every implementation of the catalog passes every check of `weftrain kernels check`, and each check finds a fault.

One parametrized test covers kernels/ops, the *_ops folders and what kernels/derivatives.py and kernels/operators.py
give them; the planted faults cover numerics.py, composition.py, bounds.py, bad_input.py and the guarded processes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels import OPS, Implementation, KernelError, Spec, load_catalog, reference
from weftrain.kernels.checks import CHECKS, CheckReport, run_checks, summary
from weftrain.kernels.checks.__main__ import main
from weftrain.kernels.checks.bounds import _judge_margins
from weftrain.kernels.checks.findings import DTYPES, Subject, to_json

LONG = (  # five to ten seconds each
    *(("rms_norm", "torch"), ("adamw", "torch"), ("attention", "reference"), ("attention", "torch")),
    *(("linear_cross_entropy", source) for source in ("reference", "torch", "cpp")),
)
PAIRS = [
    pytest.param(op, source, marks=pytest.mark.prove if (op, source) in LONG else ())
    for op, sources in load_catalog().items()
    for source in sources
]
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("op", "source"), PAIRS, ids=lambda value: value)
def test_every_implementation_passes_every_check(op: str, source: str, kernel_device: str) -> None:
    report = run_checks([op], [source], kernel_device)
    if not report:
        pytest.skip(f"{op} of {source}: {report.skipped[0].reason}")
    assert not report.failed, "\n".join(summary(report))


def test_every_check_asks_something_of_the_reference() -> None:
    """A check without cases would pass everything."""
    for check in CHECKS.values():
        asked = [name for name in OPS if check.cases(_subject(name))]
        # not asked of the reference: it is plain torch
        assert asked or check.name in ("inductor", "autocast", "thresholds", "memory", "time"), check.name
    assert all(len(CHECKS["refused"].cases(_subject(name))) >= 3 for name in OPS)
    assert all(CHECKS["numerics"].cases(_subject(name)) for name in OPS)


def _subject(op: str) -> Subject:
    return Subject(Implementation(op, "reference", OPS[op].function), "cpu", DTYPES)


def test_the_exact_formulas_are_written_apart_from_the_reference() -> None:
    assert all(op.exact.__module__ == f"weftrain.kernels.ops.{name}" for name, op in OPS.items())
    assert [op.function for op in OPS.values()] == list(reference.FUNCTIONS)


# ---- planted faults
# ----------------------------------------------------------------------------------------------------


class _OnePercentMore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


class _NeedsAGradient(torch.autograd.Function):
    """Whose backward fails where its gradient is not dense, or never comes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view(-1).view(grad.shape)


def _scaled_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return _OnePercentMore.apply(reference.swiglu(gate, up))  # type: ignore[no-any-return]


def _needs_a_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return _NeedsAGradient.apply(reference.swiglu(gate, up))  # type: ignore[no-any-return]


def _fp32_output(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up).float()


def _accepts_anything(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _differs_from_run_to_run(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up) * (1 + 1e-3 * torch.rand(()))


def _changes_its_input(gate: Tensor, up: Tensor) -> Tensor:
    result = reference.swiglu(gate, up)
    up.data.mul_(1.0001)
    return result


def _hides_nan(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up).nan_to_num()


def _dense_only(gate: Tensor, up: Tensor) -> Tensor:
    """Takes the storage for the tensor."""
    return reference.swiglu(*(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (gate, up)))


def _breaks_the_graph(gate: Tensor, up: Tensor) -> Tensor:
    return reference.swiglu(gate, up) if float(gate.sum()) == float(gate.sum()) else gate


def _fails_without_rows(gate: Tensor, up: Tensor) -> Tensor:
    result = reference.swiglu(gate, up)
    assert result.detach().amax().isfinite() or True
    return result


def _reads_beyond(gate: Tensor, up: Tensor) -> Tensor:
    ctypes.string_at(up.data_ptr() + up.numel() * up.element_size(), 4)
    return reference.swiglu(gate, up)


def _reads_before(gate: Tensor, up: Tensor) -> Tensor:
    ctypes.string_at(gate.data_ptr() - 4, 4)
    return reference.swiglu(gate, up)


def _writes_beyond_its_output(gate: Tensor, up: Tensor) -> Tensor:
    output = torch.empty(gate.shape, dtype=gate.dtype)
    ctypes.memset(output.data_ptr() + output.numel() * output.element_size(), 0, 4)
    return reference.swiglu(gate, up) + 0 * output.nan_to_num()


def _leaves_its_output_unwritten(gate: Tensor, up: Tensor) -> Tensor:
    return torch.where(
        torch.arange(up.shape[-1]) < up.shape[-1] - 1, reference.swiglu(gate, up), torch.empty(gate.shape)
    )


def _rounded_statistic(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    statistic = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype).float()
    return (weight.float() * (x.float() * statistic)).to(x.dtype)


def _sees_the_next_token(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_start: Tensor | None = None, window: int | None = None
) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(2)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype), v)


def _overwrites_gradients(parameters: list[Tensor], gradients: list[Tensor], *rest: Any, **statics: Any) -> None:
    reference.adamw(parameters, gradients, *rest, **statics)
    gradients[0].mul_(0.5)


FAULTS: list[tuple[str, Callable[..., Any], str, torch.dtype, str]] = [
    ("swiglu", _scaled_gradient, "numerics", FP32, "grad_gate: error 1.00e-02"),
    ("swiglu", _fp32_output, "numerics", BF16, "output is float32"),
    ("attention", _sees_the_next_token, "numerics", FP32, "output: error"),
    ("rms_norm", _rounded_statistic, "rounded_once", BF16, "are not an fp32 result rounded once to bfloat16"),
    ("swiglu", _hides_nan, "non_finite", FP32, "output is finite in 1 of 1 elements that depend on it"),
    ("swiglu", _breaks_the_graph, "compile", FP32, "Could not guard on data-dependent expression"),
    ("swiglu", _dense_only, "strides", FP32, "every second element: output"),
    ("swiglu", _needs_a_gradient, "unwanted", FP32, "raised AttributeError"),
    ("swiglu", _differs_from_run_to_run, "determinism", FP32, "bits of output differ within 20 runs"),
    ("swiglu", _changes_its_input, "determinism", FP32, "input up was changed"),
    ("adamw", _overwrites_gradients, "determinism", FP32, "input gradients[0] was changed"),
    ("swiglu", _reads_beyond, "bounds", FP32, "the process ended by SIGSEGV"),
    ("swiglu", _reads_before, "bounds", FP32, "the process ended by SIGSEGV"),
    ("swiglu", _writes_beyond_its_output, "bounds", FP32, "the process ended by SIGSEGV"),
    ("swiglu", _leaves_its_output_unwritten, "bounds", FP32, "depends on what lies around a tensor: output"),
    ("swiglu", _accepts_anything, "refused", FP32, "was accepted; the reference refuses it"),
    ("swiglu", _fails_without_rows, "edges", FP32, "raised"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault[2]}-{fault[1].__name__.strip('_')}" for fault in FAULTS])
def test_each_check_finds_its_fault(fault: tuple[str, Callable[..., Any], str, torch.dtype, str]) -> None:
    op, function, check, dtype, words = fault
    report = run_checks(dtypes=[dtype], checks=[check], implementations=[Implementation(op, "planted", function)])
    assert any(words in finding.detail for finding in report.failed), "\n".join(summary(report))


def test_opcheck_finds_an_operator_with_a_wrong_fake() -> None:
    """Found by being called, whatever its namespace."""
    library = torch.library.Library("planted_namespace", "DEF")
    library.define("swiglu(Tensor gate, Tensor up) -> Tensor")
    library.impl("swiglu", lambda gate, up: F.silu(gate) * up, "CPU")
    torch.library.register_fake(
        "planted_namespace::swiglu", lambda gate, up: gate.new_empty(gate.shape[:-1]), lib=library
    )

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            return torch.ops.planted_namespace.swiglu(gate.detach(), up.detach())  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return Function.apply(gate, up)  # type: ignore[no-any-return]

    (finding,) = run_checks(
        dtypes=[FP32], checks=["opcheck"], implementations=[Implementation("swiglu", "planted", swiglu)]
    )
    assert not finding.ok
    assert "planted_namespace.swiglu.default test_faketensor" in finding.detail


def _has_margins(tensor: Tensor) -> bool:
    """As a kernel on a GPU could read them; torch refuses to leave a storage."""
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def _reads_its_neighbour(gate: Tensor, up: Tensor) -> Tensor:
    output = reference.swiglu(gate, up)
    return output + up.detach().as_strided((1,), (1,), up.storage_offset() + up.numel()) if _has_margins(up) else output


def _writes_its_neighbour(gate: Tensor, up: Tensor) -> Tensor:
    if _has_margins(gate):
        gate.detach().as_strided((1,), (1,), gate.storage_offset() - 1).zero_()
    return reference.swiglu(gate, up)


@pytest.mark.parametrize(
    ("op", "function", "words"),
    [
        *((name, op.function, "is neither read nor written") for name, op in OPS.items()),
        ("swiglu", _reads_its_neighbour, "reads what lies around a tensor: output"),
        ("swiglu", _writes_its_neighbour, "writes around gate"),
    ],
)
def test_margins_of_nan_stand_for_guard_pages_on_an_accelerator(
    op: str, function: Callable[..., Any], words: str
) -> None:
    """What the check does there, run on a CPU."""
    subject = Subject(Implementation(op, "planted", function), "cpu", DTYPES)
    for case in subject.quick():
        assert words in _judge_margins(subject, case).detail


# ---- the run
# ----------------------------------------------------------------------------------------------------


def test_what_is_unavailable_is_skipped_with_its_reason_and_never_called() -> None:
    def never(**_: Any) -> Any:
        raise AssertionError("called")

    def unavailable(spec: Spec) -> str | None:
        return "needs a tape drive" if spec.dtype == BF16 or spec.attributes["head_dim"] > 20 else None

    item = Implementation("attention", "planted", never, unavailable)
    report = run_checks(dtypes=[BF16], implementations=[item])
    assert not report
    assert [(skipped.example, skipped.reason) for skipped in report.skipped] == [("*", "needs a tape drive")]
    report = run_checks(dtypes=[FP32], checks=["numerics"], implementations=[item])
    assert {skipped.example for skipped in report.skipped} == {
        name for name in OPS["attention"].small if name.startswith(("edge", "odd_blocks"))
    }
    assert report.failed == list(report)
    assert {finding.detail for finding in report} == {"raised AssertionError: called"}


def test_unknown_names_are_refused() -> None:
    for arguments, words in (
        ({"ops": ["swigloo"]}, "unknown op 'swigloo'"),
        ({"sources": ["torhc"]}, "unknown source 'torhc'"),
        ({"checks": ["numeric"]}, "unknown check 'numeric'"),
    ):
        with pytest.raises(KernelError, match=words):
            run_checks(**arguments)  # type: ignore[arg-type]


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    report = run_checks(
        ["swiglu"], ["reference"], checks=["numerics"], progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(done, len(report)) for done in range(len(report) + 1)]


def test_the_process_entry(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "findings.json"
    assert (
        main(
            [
                "--ops",
                "swiglu",
                "--sources",
                "torch",
                "--checks",
                "numerics",
                "--dtypes",
                "float32",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 0 failed, 0 skipped"
    findings = json.loads(path.read_text())["findings"]
    assert [finding["example"] for finding in findings] == list(OPS["swiglu"].small)
    assert all(finding["figures"]["output"] <= finding["figures"]["output_allowed"] for finding in findings)
    assert main(["--third-party"]) == 1  # nothing was checked


def test_a_report_as_json_names_what_was_skipped() -> None:
    report: CheckReport = run_checks(["swiglu"], ["triton"])
    assert not report
    assert {item["dtype"] for item in json.loads(to_json(report))["skipped"]} == {"float32", "bfloat16", "float16"}
