"""The decoder's structure: names, segments, precision, documents and tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_cases import amber, crystal, decoder, large_weights, tokens
from torch import Tensor

from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs
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
