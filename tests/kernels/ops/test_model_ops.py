"""attention and the losses, of every source of the catalog, where `weftrain kernels check` does not look: bits of what
is hidden, ignored rows, chunks and blocks.

The general checks (errors against float64, dtypes, rounding) are run by checks/test_engine.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from weftrain.kernels import OPS, Implementation, Spec, load_catalog
from weftrain.kernels.checks.evaluation import Results, distance, evaluate, exact_arguments
from weftrain.kernels.checks.numerics import CAP
from weftrain.kernels.contract import Arguments, KernelError
from weftrain.kernels.ops.attention import example

CATALOG = load_catalog()


def usable_sources(op: str, dtype: torch.dtype, **attributes: int | bool) -> list[Implementation]:
    spec = Spec(op, "example", "cpu", dtype, {**OPS[op].attributes, **attributes})
    return [variant for variants in CATALOG[op].values() for variant in variants if variant.unavailable(spec) is None]


def exact(op: str, arguments: Arguments) -> Results:
    return evaluate(OPS[op], OPS[op].exact, exact_arguments(arguments))


def largest_error(got: Results, truth: Results) -> float:
    return max(distance(got[name], tensor) for name, tensor in truth.items())


def test_attention_sees_nothing_of_the_future_or_of_other_documents() -> None:
    arguments = OPS["attention"].examples["odd_documents"]("cpu", torch.float32)
    start = arguments["document_start"]
    for implementation in usable_sources("attention", torch.float32, head_dim=20, document_start=True):
        before = implementation.function(**arguments)
        for t in (0, 20, 62):
            changed = {name: arguments[name].clone() for name in ("k", "v")}
            invisible = (torch.arange(63) > t) | (torch.arange(63) < start[:, t, None])
            for tensor in changed.values():
                tensor[invisible] = 1e4
            assert torch.equal(implementation.function(**{**arguments, **changed})[:, t], before[:, t]), (
                implementation.source
            )


@pytest.mark.parametrize("kept_tokens", [0, 1024], ids=["probabilities_again", "probabilities_kept"])
def test_attention_keeps_or_recomputes_the_same(kept_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """269 tokens are three blocks of queries; both ways of the backward give the reference's gradients."""
    import weftrain.kernels.torch_ops.attention as module

    monkeypatch.setattr(module, "_KEPT_TOKENS", kept_tokens)
    op = OPS["attention"]
    arguments = op.examples["odd_blocks"]("cpu", torch.float32)
    expected = {name: tensor.double() for name, tensor in evaluate(op, op.function, arguments).items()}
    assert largest_error(evaluate(op, module.attention_blocked, arguments), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_of_accelerators(dtype: torch.dtype) -> None:
    """The named source `sdpa`, which a CPU is not offered, runs there too and is held to the same cap."""
    from weftrain.kernels.torch_ops.attention import attention_fused

    for name in ("odd", "odd_documents", "odd_window", "odd_grouped"):
        arguments = OPS["attention"].examples[name]("cpu", dtype)
        assert (
            largest_error(evaluate(OPS["attention"], attention_fused, arguments), exact("attention", arguments))
            < CAP[dtype]
        )


def test_fused_attention_refuses_what_torch_would_repeat_heads_for() -> None:
    """And says so before the run, too: `select` passes it over."""
    arguments = OPS["attention"].examples["odd_grouped_window"]("cpu", torch.float32)
    (sdpa,) = CATALOG["attention"]["sdpa"]
    with pytest.raises(KernelError, match="unfused kernel alone, which repeats keys and values; use source triton"):
        sdpa.function(**arguments)
    for attributes in ({"window": 7}, {"document_start": True}):
        spec = Spec("attention", "example", "cuda", torch.bfloat16, {"heads_per_key": 4, **attributes})
        assert "repeats keys and values" in str(sdpa.unavailable(spec))
        assert sdpa.unavailable(Spec("attention", "example", "cuda", torch.bfloat16, attributes)) is None


def test_attention_sees_its_window_and_its_key_head_alone() -> None:
    """Every source: keys out of sight, and other key heads, change no bit of a query head's output."""
    arguments = example(1, 70, 6, 32, kv_heads=2, window=20, documents=True)("cpu", torch.bfloat16)
    start = arguments["document_start"]
    for implementation in usable_sources("attention", torch.bfloat16, head_dim=32, heads_per_key=3, window=20):
        before = implementation.function(**arguments)
        for t in (0, 33, 69):
            changed = {name: arguments[name].clone() for name in ("k", "v")}
            key = torch.arange(70)
            for tensor in changed.values():
                tensor[:, (key > t) | (key < max(t - 19, int(start[0, t])))] = 1e4
                tensor[:, :, 1] = 1e4
            after = implementation.function(**{**arguments, **changed})
            assert torch.equal(after[:, t, :3], before[:, t, :3]), implementation.source
            assert not torch.equal(after[:, t, 3:], before[:, t, 3:]), implementation.source


@pytest.mark.parametrize(("kv_heads", "window"), [(6, None), (2, None), (1, 5), (3, 16), (2, 40)])
def test_the_reference_is_the_eager_attention_of_transformers_bit_for_bit(kv_heads: int, window: int | None) -> None:
    """Their mask of a sliding window counts the query itself, as ours does."""
    transformers = pytest.importorskip("transformers")
    masks = pytest.importorskip("transformers.masking_utils")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    arguments = example(2, 33, 6, 24, kv_heads=kv_heads, window=window)("cpu", torch.float32)
    q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
    config = transformers.LlamaConfig(
        num_attention_heads=6, num_key_value_heads=kv_heads, hidden_size=144, attn_implementation="eager"
    )
    config.sliding_window = window
    make = masks.create_causal_mask if window is None else masks.create_sliding_window_causal_mask
    mask = make(config, torch.empty(2, 33, 144), None, past_key_values=None)
    module = SimpleNamespace(num_key_value_groups=6 // kv_heads, training=False)
    expected, _ = llama.eager_attention_forward(module, q, k, v, mask, arguments["scale"])
    assert torch.equal(OPS["attention"].function(**arguments), expected)


@pytest.mark.parametrize(
    ("window", "flops"), [(None, 4 * 6 * 24 * 33 * 34 // 2), (1, 4 * 6 * 24 * 33), (5, 4 * 6 * 24 * (15 + 28 * 5))]
)
def test_the_cost_of_attention_counts_visible_pairs_and_key_heads(window: int | None, flops: int) -> None:
    op, arguments = OPS["attention"], example(1, 33, 6, 24, kv_heads=2, window=window)("cpu", torch.float32)
    assert op.flops(arguments) == flops
    assert op.backward_cost is not None
    assert op.backward_cost(arguments) == (4 * 4 * 33 * 24 * (6 + 2), flops * 5 // 2)
    assert op.bytes_moved(arguments) == 4 * 33 * 24 * (2 * 6 + 2 * 2)


@pytest.mark.parametrize("limit", [101 * 64, 101 * 128, 1 << 24], ids=["64_rows", "128_rows", "one_chunk"])
def test_linear_cross_entropy_is_the_same_in_any_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import weftrain.kernels.torch_ops.linear_cross_entropy as module

    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", limit)
    op = OPS["linear_cross_entropy"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = {**op.examples["odd_chunks"]("cpu", dtype), "logits_scale": 0.7, "z_loss": 1e-3}
        truth = exact(op.name, arguments)
        assert largest_error(evaluate(op, module.linear_cross_entropy, arguments), truth) < CAP[dtype]
        assert (
            distance(evaluate(op, module.linear_cross_entropy, arguments, wanted=())["output"], truth["output"])
            < CAP[dtype]
        )


def test_cross_entropy_of_ignored_rows_is_zero_and_moves_nothing() -> None:
    op = OPS["cross_entropy"]
    arguments = op.examples["odd_scaled"]("cpu", torch.float32)
    ignored = arguments["labels"] == -100
    assert ignored.any()
    for implementation in usable_sources("cross_entropy", torch.float32):
        results = evaluate(op, implementation.function, arguments)
        assert (results["output"][ignored] == 0).all()
        assert (results["grad_logits"][ignored] == 0).all()
        assert (results["output"][~ignored] != 0).all()
    op = OPS["linear_cross_entropy"]
    everything = {**op.examples["odd"]("cpu", torch.float32), "labels": torch.full((29,), 7), "ignore_index": 7}
    for implementation in usable_sources("linear_cross_entropy", torch.float32):
        assert all((tensor == 0).all() for tensor in evaluate(op, implementation.function, everything).values())


@pytest.mark.parametrize("op_name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_weights_multiply_whole_losses_and_nothing_else(op_name: str, dtype: torch.dtype) -> None:
    """Ones change no bit; a power of two scales every result exactly; what an ignored token weighs is not looked at; a
    weight receives no gradient.
    """
    op = OPS[op_name]
    plain = {**op.examples["odd_smoothed"]("cpu", dtype)}
    ones = torch.ones(29)
    for implementation in usable_sources(op_name, dtype, label_smoothing=0.1, token_weights=True):
        function = implementation.function
        expected = evaluate(op, function, plain)
        for weights, factor in (
            (ones, 1.0),
            (-4 * ones, -4.0),
            (torch.where(plain["labels"] == -100, float("inf"), 1.0), 1.0),
        ):
            got = evaluate(op, function, {**plain, "token_weights": weights})
            assert all(torch.equal(got[name], factor * tensor) for name, tensor in expected.items()), (
                implementation.source
            )
        weights = (ones / 3).requires_grad_()
        leaves = {name: plain[name].detach().requires_grad_() for name in op.differentiable}
        function(**{**plain, **leaves, "token_weights": weights}).sum().backward()
        assert weights.grad is None


def test_token_weights_give_the_weighted_sum_of_the_tokens_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over chunks too: each token's gradient is taken alone, by the exact formula, and weighted outside of the op."""
    import weftrain.kernels.torch_ops.linear_cross_entropy as module

    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", 101 * 64)
    op = OPS["linear_cross_entropy"]
    arguments = op.examples["odd_chunks"]("cpu", torch.float32)
    arguments |= {"label_smoothing": 0.2, "z_loss": 1e-2, "logits_softcap": 2.5}
    weights = torch.linspace(-1, 2, 201)
    losses = OPS["cross_entropy"].exact
    wide = exact_arguments({**arguments, "token_weights": weights})
    hidden, weight = wide.pop("hidden").requires_grad_(), wide.pop("weight").requires_grad_()
    wide.pop("token_weights")
    total = (losses(hidden @ weight.mT, **wide) * weights.double()).sum()
    truth = dict(zip(("grad_hidden", "grad_weight"), torch.autograd.grad(total, (hidden, weight)), strict=True))
    truth["output"] = total.detach()
    arguments["token_weights"] = weights
    got = evaluate(op, module.linear_cross_entropy, arguments, arrange=torch.ones_like)
    assert largest_error(got, truth) < 1e-6


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_that_of_torch(smoothing: float) -> None:
    arguments = OPS["cross_entropy"].examples["odd"]("cpu", torch.float32)
    expected = torch.nn.functional.cross_entropy(**_named(arguments), label_smoothing=smoothing, reduction="none")
    for implementation in usable_sources("cross_entropy", torch.float32, label_smoothing=smoothing):
        got = implementation.function(**arguments, label_smoothing=smoothing)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def _named(arguments: Arguments) -> Arguments:
    return {"input": arguments["logits"], "target": arguments["labels"]}


def test_the_reference_of_ignored_rows_with_nan_is_zero_forward() -> None:
    arguments = OPS["cross_entropy"].examples["odd"]("cpu", torch.float32)
    arguments["logits"][0] = float("nan")  # row 0 is ignored
    for implementation in usable_sources("cross_entropy", torch.float32):
        assert implementation.function(**arguments)[0] == 0, implementation.source
