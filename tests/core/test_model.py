"""The decoder's structure: names, segments, precision, documents, tracing, and the drawing of initial weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from model_cases import amber, crystal, decoder, large_weights, tokens
from torch import Tensor

from weftrain.core.model import Decoder, draw, initialize, kernel_specs
from weftrain.core.model_config import Initialization, ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role, parameter_specs
from weftrain.kernels import Selection, select

BOTH = pytest.mark.parametrize("build", [amber, crystal])
Build = Callable[..., ModelConfig]


@BOTH
def test_parameters_are_the_specified_ones_in_order(build: Build) -> None:
    config = build()
    model = decoder(config, large_weights(config))
    found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert found == [(spec.name, spec.shape) for spec in parameter_specs(config)]
    assert list(model.state_dict()) == [spec.name for spec in parameter_specs(config)]  # rotary tables are not saved


@BOTH
def test_segments_compose_to_forward_bit_for_bit(build: Build) -> None:
    config = build()
    model = decoder(config, large_weights(config))
    ids, labels = tokens(config, 2, 33), tokens(config, 2, 33, seed=2)
    embedding, *blocks, head = model.segments()

    names = [f"{segment.prefix}{name}" for segment in model.segments() for name, _ in segment.named_parameters()]
    assert names == [spec.name for spec in parameter_specs(config)]

    x = embedding(ids)
    for block, rotary in zip(blocks, model.rotary(33), strict=True):
        x = block(x, rotary, None)
    assert torch.equal(head(x, labels, model.tied_weight()), model(ids, labels))
    assert torch.equal(head.logits(x, model.tied_weight()), model.logits(ids))


@BOTH
def test_head_refuses_the_wrong_weight(build: Build) -> None:
    config = build()
    model = decoder(config, large_weights(config))
    wrong = None if config.tie_embeddings else model.embedding.weight
    with pytest.raises(ValueError, match="embeddings are tied"):
        model.segments()[-1](torch.zeros(1, 2, config.hidden_size), torch.zeros(1, 2, dtype=torch.int64), wrong)


@BOTH
def test_every_op_comes_through_the_selection(build: Build) -> None:
    config = build()
    specs = kernel_specs(config, "cpu", torch.float32)
    asked: set[tuple[str, str]] = set()

    class Recording(Selection):
        def function(self, op: str, module: str) -> Callable[..., Tensor]:
            asked.add((op, module))
            return super().function(op, module)

    chosen = select(specs, ("reference",))
    Decoder(config, Recording(chosen.functions, chosen.manifest))
    assert asked == {(spec.op, spec.module) for spec in specs}
    assert len(asked) == len(specs)


def test_ignored_labels_bear_no_loss() -> None:
    config = crystal()
    model = decoder(config, large_weights(config))
    ids, labels = tokens(config, 2, 8), tokens(config, 2, 8, seed=2)
    whole = model(ids, labels)
    first, second = labels.clone(), labels.clone()
    first[:, 4:] = -100
    second[:, :4] = -100
    torch.testing.assert_close(model(ids, first) + model(ids, second), whole)
    assert model(ids, torch.full_like(labels, -100)) == 0


@BOTH
def test_documents_packed_into_one_row_do_not_see_each_other(build: Build) -> None:
    config = build()
    model = decoder(config, large_weights(config))
    ids = tokens(config, 1, 20)
    start = torch.tensor([[0] * 12 + [12] * 8], dtype=torch.int32)
    with torch.no_grad():
        packed, alone, blended = model.logits(ids, start)[:, 12:], model.logits(ids[:, 12:]), model.logits(ids)[:, 12:]
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=0)  # rotary is relative: only its rounding differs
    assert (blended - alone).abs().max() > 0.05


@BOTH
def test_bf16_weights_with_an_fp32_residual_stream_are_autocast(build: Build) -> None:
    config = build()
    weights = {name: tensor.bfloat16() for name, tensor in large_weights(config).items()}
    mixed = decoder(config, weights, torch.bfloat16, torch.float32)
    full = decoder(config, {name: tensor.float() for name, tensor in weights.items()})
    ids = tokens(config, 2, 33)
    with torch.no_grad():
        assert mixed.embedding(ids).dtype is torch.float32
        assert mixed.layers[0](mixed.embedding(ids), mixed.rotary(33)[0]).dtype is torch.float32
        logits = mixed.logits(ids)
        assert logits.dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            expected = full.logits(ids)
    assert torch.equal(logits, expected)


def test_residual_stream_follows_the_parameters_by_default() -> None:
    config = amber()
    model = decoder(config, {name: tensor.bfloat16() for name, tensor in large_weights(config).items()}, torch.bfloat16)
    ids = tokens(config, 1, 9)
    assert model.layers[0](model.embedding(ids), model.rotary(9)[0]).dtype is torch.bfloat16
    loss = model(ids, ids)
    assert loss.dtype is torch.float32
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype is torch.bfloat16 for parameter in model.parameters()
    )


@BOTH
@pytest.mark.parametrize("part", ["block", "model"])
def test_compiles_to_one_graph(build: Build, part: str) -> None:
    config = build(num_layers=1)
    model = decoder(config, large_weights(config))
    ids, labels = tokens(config, 2, 16), tokens(config, 2, 16, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(model.layers[0] if part == "block" else model, fullgraph=True, backend="aot_eager")
    x = model.embedding(ids).detach()
    arguments = (x, model.rotary(16)[0]) if part == "block" else (ids, labels)
    eager = (model.layers[0] if part == "block" else model)(*arguments)
    traced = compiled(*arguments)
    torch.testing.assert_close(traced, eager)
    traced.sum().backward()
    assert model.layers[0].ffn.down_proj.weight.grad is not None


def test_meta_device_allocates_nothing_and_comes_to_life() -> None:
    config = crystal()
    with torch.device("meta"):
        model = Decoder(config, select(kernel_specs(config, "cpu", torch.float32), ("reference",)))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    loss = model(
        torch.zeros(1, 4, dtype=torch.int64, device="meta"), torch.zeros(1, 4, dtype=torch.int64, device="meta")
    )
    assert loss.shape == ()
    model.to_empty(device="cpu")
    model.place_rotary_tables("cpu")
    weights, ids = large_weights(config), tokens(config, 1, 9)
    model.load_state_dict(weights)
    assert torch.equal(model.logits(ids), decoder(config, weights).logits(ids))


@BOTH
def test_initialize_draws_each_tensor_alone(build: Build) -> None:
    config = build()
    whole, by_segment = decoder(config, large_weights(config)), decoder(config, large_weights(config))
    initialize(whole, config, seed=7)
    for segment in reversed(by_segment.segments()):
        initialize(segment, config, seed=7)
    for (name, one), other in zip(whole.named_parameters(), by_segment.parameters(), strict=True):
        assert torch.equal(one, other), name
    specs = {spec.name: spec for spec in parameter_specs(config)}
    name = "layers.1.ffn.down_proj.weight"
    assert torch.equal(whole.get_parameter(name), draw(specs[name], config, 7))
    assert not torch.equal(draw(specs[name], config, 7), draw(specs[name], config, 8))
    assert not torch.equal(
        draw(specs["layers.1.attention.q_proj.weight"], config, 7),
        draw(specs["layers.1.attention.k_proj.weight"], config, 7),
    )


@pytest.mark.parametrize("distribution", ["normal", "truncated_normal"])
def test_drawn_tensors_have_the_stated_distribution(distribution: str) -> None:
    stds = Initialization.model_validate(
        {"distribution": distribution, "embedding_std": 0.1, "matrix_std": 0.2, "output_matrix_std": 0.05}
    )
    config = amber(vocab_size=4096, hidden_size=128, intermediate_size=4096, initialization=stds, linear_bias=True)
    expected = {Role.EMBEDDING: 0.1, Role.HEAD: 0.2, Role.MATRIX: 0.2, Role.OUTPUT_MATRIX: 0.05}
    # Standard deviation of a unit normal cut at 2: sqrt(1 - 4 pdf(2) / P(|z| < 2)) = 0.8796
    shrink = (
        1.0
        if distribution == "normal"
        else math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    )
    for spec in parameter_specs(config):
        values = draw(spec, config, 0)
        assert values.shape == spec.shape
        assert values.dtype is torch.float32
        if spec.role is Role.NORM_WEIGHT:
            assert (values == 1).all()
        elif spec.role in (Role.NORM_BIAS, Role.BIAS):
            assert (values == 0).all()
        elif spec.size > 500_000:
            std = expected[spec.role]
            assert values.std().item() == pytest.approx(std * shrink, rel=0.01)
            assert abs(values.mean().item()) < 0.005 * std
            largest = values.abs().max().item() / std
            assert largest <= 2.0001 if distribution == "truncated_normal" else 4 < largest < 5.5


def test_a_large_tensor_is_the_same_whatever_threads_draw_it() -> None:
    """Shares of a tensor begin where the counter stands after the elements before them."""
    config = amber(vocab_size=48_611, hidden_size=64)  # three shares, the last of them odd
    spec = parameter_specs(config)[0]
    assert spec.role is Role.EMBEDDING
    key = int.from_bytes(hashlib.sha256(f"5/{spec.name}".encode()).digest()[:16], "little")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(spec.shape, dtype=np.float32)
    std = resolve_scales(config).embedding_std
    wanted = torch.from_numpy(uniform).mul_(2).add_(2**-24 - 1).erfinv_().mul_(std * math.sqrt(2))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(draw(spec, config, 5), wanted)
    finally:
        torch.set_num_threads(threads)


def test_initial_weights_never_change() -> None:
    """A seed names its weights for good: records of past runs lean on it."""
    spec = next(spec for spec in parameter_specs(crystal()) if spec.name == "layers.0.attention.q_proj.weight")
    expected = torch.tensor([-0.0322958492, -0.0295749623, -0.0311444364, -0.0640561506])
    torch.testing.assert_close(draw(spec, crystal(), 1)[0, :4], expected, rtol=1e-6, atol=0)
