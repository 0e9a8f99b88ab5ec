"""Every implementation of every op against float64 formulas written here, forward and every gradient, at odd sizes, in fp32 and bf16.

The rule: an implementation may err at most 2x (forward) and 3x (gradients) as much as the reference does in that dtype, and both stay below
a cap. Errors are relative Frobenius norms, so one wrong element of a small tensor shows. FLOOR is a quarter of one rounding's typical
error: below it, a ratio of errors is luck (the loss is one number, and the reference may hit it by chance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.kernels import OPS, Implementation, Spec, load_catalog

CAP = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # fp32: 8 roundings of 2^-23; bf16: 2.5 roundings of 2^-8
FLOOR = {torch.float32: 1e-8, torch.bfloat16: 5e-4}
CATALOG = load_catalog()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the formulas, in float64 -------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight + bias


def rope(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    half = rotary_dim // 2
    out = list(x.unbind(-1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(x[..., a], x[..., b]) * torch.complex(cos[:, i], sin[:, i])[:, None]
        out[a], out[b] = turned.real, turned.imag
    return torch.stack(out, -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
    rows = []
    for t in range(q.shape[1]):
        weights = (torch.einsum("bhd,bshd->bsh", q[:, t], k[:, : t + 1]) * scale).exp()
        if document_start is not None:
            weights = weights * (torch.arange(t + 1) >= document_start[:, t, None])[..., None]
        rows.append(torch.einsum("bsh,bshd->bhd", weights / weights.sum(1, keepdim=True), v[:, : t + 1]))
    return torch.stack(rows, 1)


def cross_entropy(logits: Tensor, labels: Tensor, logits_scale: float = 1.0, ignore_index: int = -100, z_loss: float = 0.0) -> Tensor:
    losses = []
    for row, label in zip(logits * logits_scale, labels.tolist(), strict=True):
        log_sum = row.exp().sum().log()
        losses.append(log_sum * 0 if label == ignore_index else log_sum - row[label] + z_loss * log_sum**2)
    return torch.stack(losses)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **statics: Any) -> Tensor:
    return cross_entropy(hidden @ weight.mT, labels, **statics).sum()


EXACT: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (rms_norm, layer_norm, rope, swiglu, attention, cross_entropy, linear_cross_entropy)
}

# ---- the comparison -----------------------------------------------------------------------------------------------------------------


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def results(function: Callable[..., Tensor], arguments: dict[str, Any], differentiable: tuple[str, ...]) -> list[Tensor]:
    """The output and the gradient of each differentiable argument, in float64, for a fixed incoming gradient."""
    arguments = dict(arguments)
    leaves = [arguments[name].detach().clone().requires_grad_() for name in differentiable]
    arguments.update(zip(differentiable, leaves, strict=True))
    output = function(**arguments)
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)
    return [tensor.double() for tensor in (output.detach(), *torch.autograd.grad(output, leaves, incoming))]


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    return float((got - exact).norm() / exact.norm().clamp(min=1e-6))  # of one token, the gradients of q and k are 0


def small_examples() -> list[tuple[str, str, torch.dtype]]:
    names = [(op, name) for op in EXACT for name in OPS[op].examples if name.startswith("odd")]
    return [(op, name, dtype) for op, name in [*names, ("attention", "one_token")] for dtype in (torch.float32, torch.bfloat16)]


def usable_sources(op: str, dtype: torch.dtype) -> list[Implementation]:
    spec = Spec(op, "example", "cpu", dtype, OPS[op].attributes)
    return [variant for variants in CATALOG[op].values() for variant in variants if variant.unavailable(spec) is None]


@pytest.mark.parametrize(("op", "example", "dtype"), small_examples(), ids=lambda value: str(value).removeprefix("torch."))
def test_forward_and_gradients_against_float64(op: str, example: str, dtype: torch.dtype) -> None:
    arguments = OPS[op].examples[example]("cpu", dtype)
    wide = {name: cast(value, torch.float64) for name, value in arguments.items()}
    names = ("output", *(f"grad_{name}" for name in OPS[op].differentiable))
    exact = results(EXACT[op], wide, OPS[op].differentiable)
    reference = [error(*pair) for pair in zip(results(OPS[op].function, arguments, OPS[op].differentiable), exact, strict=True)]
    for implementation in usable_sources(op, dtype):
        got = results(implementation.function, arguments, OPS[op].differentiable)
        for index, (name, tensor, truth) in enumerate(zip(names, got, exact, strict=True)):
            allowed = min((3 if index else 2) * max(reference[index], FLOOR[dtype]), CAP[dtype])
            found = 0.0 if torch.equal(tensor, truth) else error(tensor, truth)
            assert found <= allowed, f"{implementation.source} {name}: error {found:.2e}, the reference's {reference[index]:.2e}"


def test_output_dtypes_follow_the_contract() -> None:
    for op in EXACT:
        arguments = OPS[op].examples["odd"]("cpu", torch.bfloat16)
        for implementation in usable_sources(op, torch.bfloat16):
            expected = torch.float32 if op.endswith("cross_entropy") else torch.bfloat16
            assert implementation.function(**arguments).dtype == expected, (op, implementation.source)


def test_mixed_dtypes_of_a_norm() -> None:
    """bf16 activations with fp32 weights, and an fp32 residual stream with bf16 weights."""
    for op in ("rms_norm", "layer_norm"):
        for x_dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            arguments = {name: cast(value, other) for name, value in OPS[op].examples["odd"]("cpu", torch.float32).items()}
            arguments["x"] = arguments["x"].to(x_dtype)
            exact = EXACT[op](**{name: cast(value, torch.float64) for name, value in arguments.items()})
            for implementation in usable_sources(op, x_dtype):
                output = implementation.function(**arguments)
                assert output.dtype == x_dtype
                assert error(output.double(), exact) < CAP[x_dtype]


def test_rms_norm_multiplies_by_the_weight_before_rounding() -> None:
    """Rounded twice, about a third of the bf16 outputs would differ from the fp32 result rounded once."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = 1 + 0.3 * torch.randn(96, generator=torch.Generator().manual_seed(1))
    once = rms_norm(x.double(), weight.double(), 1e-6).bfloat16()
    for implementation in usable_sources("rms_norm", torch.bfloat16):
        assert (implementation.function(x, weight, eps=1e-6) != once).float().mean() < 0.002, implementation.source


def test_attention_sees_nothing_of_the_future_or_of_other_documents() -> None:
    arguments = OPS["attention"].examples["odd_documents"]("cpu", torch.float32)
    start = arguments["document_start"]
    for implementation in usable_sources("attention", torch.float32):
        before = implementation.function(**arguments)
        for t in (0, 20, 62):
            changed = {name: arguments[name].clone() for name in ("k", "v")}
            invisible = (torch.arange(63) > t) | (torch.arange(63) < start[:, t, None])
            for tensor in changed.values():
                tensor[invisible] = 1e4
            assert torch.equal(implementation.function(**{**arguments, **changed})[:, t], before[:, t]), implementation.source


@pytest.mark.parametrize("kept_tokens", [0, 1024], ids=["probabilities_again", "probabilities_kept"])
def test_attention_keeps_or_recomputes_the_same(kept_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """389 tokens are four blocks of queries; both ways of the backward give the reference's gradients."""
    import weftrain.kernels.torch_ops.attention as module

    monkeypatch.setattr(module, "_KEPT_TOKENS", kept_tokens)
    arguments = OPS["attention"].examples["odd_blocks"]("cpu", torch.float32)
    got = results(module.attention_blocked, arguments, ("q", "k", "v"))
    expected = results(OPS["attention"].function, arguments, ("q", "k", "v"))
    assert max(error(*pair) for pair in zip(got, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_of_accelerators(dtype: torch.dtype) -> None:
    """What is chosen on CUDA also runs on a CPU, where it can be held to the same rule."""
    from weftrain.kernels.torch_ops.attention import attention_fused

    for example in ("odd", "odd_documents"):
        arguments = OPS["attention"].examples[example]("cpu", dtype)
        exact = results(attention, {name: cast(value, torch.float64) for name, value in arguments.items()}, ("q", "k", "v"))
        assert max(error(*pair) for pair in zip(results(attention_fused, arguments, ("q", "k", "v")), exact, strict=True)) < CAP[dtype]


@pytest.mark.parametrize("limit", [101 * 64, 101 * 128, 1 << 24], ids=["64_rows", "128_rows", "one_chunk"])
def test_linear_cross_entropy_is_the_same_in_any_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import weftrain.kernels.torch_ops.linear_cross_entropy as module

    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", limit)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {**OPS["linear_cross_entropy"].examples["odd_chunks"]("cpu", dtype), "logits_scale": 0.7, "z_loss": 1e-3}
        exact = results(linear_cross_entropy, {name: cast(value, torch.float64) for name, value in arguments.items()}, ("hidden", "weight"))
        got = results(module.linear_cross_entropy, arguments, ("hidden", "weight"))
        assert max(error(*pair) for pair in zip(got, exact, strict=True)) < CAP[dtype]
        with torch.no_grad():
            assert error(module.linear_cross_entropy(**arguments).double(), exact[0]) < CAP[dtype]


def test_cross_entropy_of_ignored_rows_is_zero_and_moves_nothing() -> None:
    arguments = OPS["cross_entropy"].examples["odd_scaled"]("cpu", torch.float32)
    ignored = arguments["labels"] == -100
    assert ignored.any()
    for implementation in usable_sources("cross_entropy", torch.float32):
        output, grad = results(implementation.function, arguments, ("logits",))
        assert (output[ignored] == 0).all()
        assert (grad[ignored] == 0).all()
        assert (output[~ignored] != 0).all()
    everything = {**OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float32), "labels": torch.full((29,), 7), "ignore_index": 7}
    for implementation in usable_sources("linear_cross_entropy", torch.float32):
        assert all((tensor == 0).all() for tensor in results(implementation.function, everything, ("hidden", "weight")))
