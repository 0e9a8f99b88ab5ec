"""A mixture of experts against float64, token by token and expert by expert: outputs, every gradient, those of the
router's losses among them, what is counted, and what is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import amber, crystal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weftrain.core.experts import MixtureOfExperts, balance_biases, measures_of, take_tallies
from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import Role, active_parameter_count, parameter_count, parameter_specs
from weftrain.core.tuning import TuningConfig, tuned_specs
from weftrain.kernels import select

PLAIN: dict[str, Any] = {"count": 5, "top_k": 2, "intermediate_size": 7, "aux_loss": 0.3, "z_loss": 0.05}
CASES = {
    "softmax": (PLAIN, 2, 9),
    "softmax renormalized": (PLAIN | {"renormalize": True, "scale": 2.5}, 2, 9),
    "sigmoid": (PLAIN | {"scores": "sigmoid"}, 3, 5),
    "sigmoid renormalized, biased": (PLAIN | {"scores": "sigmoid", "renormalize": True, "bias_update": 0.01}, 2, 9),
    "shared": (PLAIN | {"shared": 2}, 2, 9),
    "all experts": (PLAIN | {"top_k": 5}, 2, 4),
    "one expert of each token": (PLAIN | {"top_k": 1}, 2, 9),
    "fewer tokens than experts": (PLAIN | {"count": 17}, 1, 3),
    "one token": (PLAIN, 1, 1),
    "all to one": (PLAIN | {"top_k": 1, "bias_update": 0.01}, 2, 9),
    "one that nobody chooses": (PLAIN | {"bias_update": 0.01}, 2, 9),
}


def case(name: str) -> tuple[ModelConfig, dict[str, Tensor], Tensor, Tensor]:
    """Config, parameters of the layer, its input [B, T, C] and a gradient of its output."""
    experts, rows, tokens = CASES[name]
    config = amber(hidden_size=12, num_heads=2, rotary_dim=2, num_layers=1, experts=experts)
    drawn = torch.Generator().manual_seed(0)
    weights = {
        spec.name.removeprefix("layers.0.ffn."): torch.randn(spec.shape, generator=drawn) * 0.5
        for spec in parameter_specs(config)
        if spec.name.startswith("layers.0.ffn.")
    }
    if name == "all to one":
        weights["router.bias"] = F.one_hot(torch.tensor(3), 5) * 1e3
    if name == "one that nobody chooses":
        weights["router.bias"] = F.one_hot(torch.tensor(1), 5) * -1e3
    shape = (rows, tokens, 12)
    return config, weights, torch.randn(shape, generator=drawn), torch.randn(shape, generator=drawn)


def layer(config: ModelConfig, weights: dict[str, Tensor], source: str, positions: int = 1) -> MixtureOfExperts:
    selection = select(kernel_specs(config, "cpu", torch.float32), [source, "reference"])
    found = Decoder(config, selection, positions=positions).layers[0].ffn
    assert isinstance(found, MixtureOfExperts)
    assert {name: one.shape for name, one in found.named_parameters()} == {n: w.shape for n, w in weights.items()}
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(weights[name])
    return found


def exact(config: ModelConfig, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, one token after another: the output, aux and z-loss as sums over rows x tokens, and loads [E]."""
    experts = config.experts
    assert experts is not None
    outputs, aux, z = [], x.new_zeros(()), x.new_zeros(())
    total = torch.zeros(experts.count)
    for row in x:
        loads, means = torch.zeros(experts.count), x.new_zeros(experts.count)
        for token in row:
            logits = weights["router.weight"] @ token
            odds = logits.exp() / logits.exp().sum() if experts.scores == "softmax" else 1 / (1 + (-logits).exp())
            choice = odds + weights.get("router.bias", torch.zeros(experts.count))
            chosen = sorted(range(experts.count), key=lambda e: -float(choice[e].detach()))[: experts.top_k]
            whole = sum(odds[e] for e in chosen) if experts.renormalize else 1.0
            out = x.new_zeros(len(token))
            for e in chosen:
                gate, up = (weights[f"experts.{name}.weight"][e] @ token for name in ("gate_proj", "up_proj"))
                inner = gate / (1 + (-gate).exp()) * up
                out = out + odds[e] / whole * experts.scale * (weights["experts.down_proj.weight"][e] @ inner)
                loads[e] += 1
            if experts.shared:
                gate, up = (weights[f"shared.{name}.weight"] @ token for name in ("gate_proj", "up_proj"))
                out = out + weights["shared.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
            outputs.append(out)
            means = means + odds / odds.sum() / len(row)
            z = z + logits.exp().sum().log() ** 2
        aux = aux + len(row) * experts.count * (loads / loads.sum() * means).sum()
        total += loads
    return torch.stack(outputs).view(x.shape), torch.stack([aux, z]), total


@pytest.mark.parametrize("source", ["reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_output_losses_loads_and_every_gradient_are_those_of_float64(name: str, source: str) -> None:
    config, weights, x, dy = case(name)
    assert config.experts is not None
    wide = {key: weight.double().requires_grad_(key != "router.bias") for key, weight in weights.items()}
    wide_x = x.double().requires_grad_()
    out, losses, loads = exact(config, wide, wide_x)
    positions = 100
    added = (config.experts.aux_loss * losses[0] + config.experts.z_loss * losses[1]) / positions
    ((out * dy).sum() + added).backward()

    module, x = layer(config, weights, source, positions), x.requires_grad_()
    found = module(x)
    (found * dy).sum().backward()
    assert relative(found, out) < 1e-5
    gradients = {"x": x.grad, **{key: one.grad for key, one in module.named_parameters() if one.requires_grad}}
    for key, gradient in gradients.items():
        wanted = wide_x.grad if key == "x" else wide[key].grad
        assert gradient is not None
        assert relative(gradient, wanted) < 1e-5, key
    if name == "all to one":
        assert [int(one) for one in loads] == [0, 0, 0, 18, 0]
    if name == "one that nobody chooses":
        assert float(wide["experts.up_proj.weight"].grad[1].abs().max()) == 0

    tallies = take_tallies(module)
    (table,) = tallies.values()
    assert table[: config.experts.count].tolist() == loads.tolist()
    measured = measures_of(config.experts, tallies)
    assert tuple(measured) == ROUTER_MEASURES
    tokens = x.shape[0] * x.shape[1]
    assert float(measured["router_aux_loss"]) == pytest.approx(float(losses[0]) / tokens, abs=2e-6)
    assert float(measured["router_z_loss"]) == pytest.approx(float(losses[1]) / tokens, rel=1e-5, abs=2e-6)
    assert float(measured["router_load_max"]) == pytest.approx(float(loads.max() / loads.mean()))
    assert float(measured["router_dropped"]) == 0
    assert take_tallies(module) == {}


def relative(found: Tensor, wanted: Tensor | None) -> float:
    assert wanted is not None
    return float((found.detach().double() - wanted.detach()).norm() / wanted.norm().clamp(min=1e-12))


def test_a_loss_that_is_left_out_changes_the_gradient_of_the_router() -> None:
    """The comparison has teeth."""
    found = {}
    for key in ("aux_loss", "z_loss", None):
        config, weights, x, dy = case("softmax")
        assert config.experts is not None
        experts = config.experts.model_copy(update={} if key is None else {key: 0.0})
        module = layer(config.model_copy(update={"experts": experts}), weights, "reference")
        (module(x) * dy).sum().backward()
        found[key] = module.router.weight.grad
    assert min(relative(found[key], found[None]) for key in ("aux_loss", "z_loss")) > 1e-3


def test_recomputation_counts_nothing_twice_and_evaluation_nothing() -> None:
    config, weights, x, dy = case("softmax")
    tables, gradients = [], []
    for again in (False, True):
        module = layer(config, weights, "torch")
        with torch.no_grad():
            module(x)
        out = checkpoint(module, x, use_reentrant=False) if again else module(x)
        (out * dy).sum().backward()
        tables += list(take_tallies(module).values())
        gradients.append(module.router.weight.grad)
    assert len(tables) == 2
    assert torch.equal(*tables)
    assert torch.equal(*gradients)


def test_losses_and_counts_of_rows_add_up_to_those_of_the_batch() -> None:
    config, weights, x, dy = case("sigmoid")
    assert config.experts is not None
    whole, parts = layer(config, weights, "torch"), layer(config, weights, "torch")
    (whole(x) * dy).sum().backward()
    for row, gradient in zip(x, dy, strict=True):
        (parts(row[None]) * gradient).sum().backward()
    assert relative(parts.router.weight.grad, whole.router.weight.grad) < 1e-6
    loads = [next(iter(take_tallies(one).values()))[: config.experts.count] for one in (whole, parts)]
    assert torch.equal(*loads)


def test_biases_move_by_a_step_towards_equal_loads() -> None:
    config, _, _, _ = case("one that nobody chooses")
    assert config.experts is not None
    table = torch.tensor([4, 0, 2, 3, 1, 5, 0, 0, 0])
    weights = {"router.bias": torch.zeros(5)}
    balance_biases(config.experts, {"router": table}, weights)
    assert weights["router.bias"].tolist() == pytest.approx([-0.01, 0.01, 0, -0.01, 0.01])


def test_parameters_roles_and_what_a_token_is_computed_with() -> None:
    config = amber(num_layers=2, experts=PLAIN | {"shared": 1, "dense_layers": 1, "bias_update": 0.1})
    specs = {spec.name: spec for spec in parameter_specs(config)}
    assert specs["layers.0.ffn.up_proj.weight"].shape == (172, 64)
    assert specs["layers.1.ffn.experts.gate_proj.weight"].shape == (5, 7, 64)
    assert specs["layers.1.ffn.experts.down_proj.weight"].shape == (5, 64, 7)
    assert specs["layers.1.ffn.shared.down_proj.weight"].shape == (64, 7)
    assert specs["layers.1.ffn.router.weight"].role is Role.ROUTER
    assert specs["layers.1.ffn.router.bias"].planes == ("weights",)
    assert parameter_count(config) - active_parameter_count(config) == 3 * 3 * 7 * 64
    tuned = {spec.name: spec.trained for spec in tuned_specs(config, TuningConfig(freeze=("embedding",)))}
    assert not tuned["layers.1.ffn.router.bias"]  # what is not frozen is trained, and this is neither


@pytest.mark.parametrize(
    ("config", "experts", "words"),
    [
        (amber, {"top_k": 6}, r"top_k 6 is above count 5: .*lower top_k or raise count"),
        (amber, {"dense_layers": 3}, r"dense_layers 3 leaves none of num_layers 3 .*lower it"),
        (crystal, {}, r"mup has no rule for a router"),
        (lambda **more: amber(feed_forward="gelu", **more), {}, r"experts need feed_forward swiglu, and it is gelu"),
        (lambda **more: amber(linear_bias=True, **more), {}, r"experts need linear_bias false, and it is true"),
        (amber, {"count": 1}, r"greater than 1"),
        (amber, {"top_k": 1, "renormalize": True}, r"top_k 1 and renormalize true make every weight 1"),
        (amber, {"aux_loss": -1.0}, r"aux_loss"),
    ],
)
def test_what_has_no_meaning_is_refused(config: Any, experts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(experts=PLAIN | experts)
