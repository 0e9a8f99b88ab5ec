"""Coordinate check: do the sizes of activations and of their changes depend on the width? Under muP they must not.

A few AdamW steps at several widths, with muP from the narrowest and with the standard parametrization (same proxy, same
learning rate), recording the mean absolute value of every segment's output (arXiv 2203.03466, appendix D.1). Block
outputs at initialization are flat without muP too; it is their change in training that grows with width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weftrain.analysis.figure import new_figure, picture
from weftrain.core.formats import fsops
from weftrain.core.initialization import initialize
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.model_config import Initialization, ModelConfig, Mup
from weftrain.core.muon import MuonConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role, parameter_specs
from weftrain.kernels import select
from weftrain.kernels.reference import newton_schulz

# muon_*: muP's model, whose hidden matrices Muon moves (core/muon.py) with that scale
Parametrization = Literal["mup", "standard", "muon_spectral", "muon_match_adamw"]
Shape = Literal["crystalcoder", "grouped"]  # grouped: two query heads to a key head, norms of q and k, RMSNorm, no bias
WIDTHS = (64, 128, 256, 512)
HEAD_DIM = 16


@dataclass(frozen=True)
class ActivationSize:
    """One segment's output at one width and step: mean |x|, and mean |x - x at initialization|, over a fixed batch."""

    parametrization: Parametrization
    width: int
    step: int
    activation: str  # "embedding", "layers.0", ..., "logits"
    scale: float
    change: float


def coordinate_check(
    parametrizations: Sequence[Parametrization] = ("mup", "standard"),
    widths: Sequence[int] = WIDTHS,
    steps: int = 4,
    learning_rate: float = 0.005,
    seeds: int = 2,
    shape: Shape = "crystalcoder",
) -> list[ActivationSize]:
    """Train at every width on one random batch; measure before each step and after the last (CPU, fp32, seconds).

    learning_rate: of the narrowest width, muP's proxy. seeds: models averaged into each point.
    """
    points = []
    for parametrization in parametrizations:
        for width in widths:
            config = proxy_config(parametrization, width, min(widths), shape)
            muon = _muon(parametrization, min(widths))
            runs = [_train(config, steps, learning_rate, seed, muon) for seed in range(seeds)]
            for step in range(steps + 1):
                for activation in runs[0][step]:
                    scale = sum(run[step][activation].abs().mean().item() for run in runs) / seeds
                    change = (
                        sum((run[step][activation] - run[0][activation]).abs().mean().item() for run in runs) / seeds
                    )
                    points.append(ActivationSize(parametrization, width, step, activation, scale, change))
    return points


def proxy_config(
    parametrization: Parametrization, width: int, base_width: int, shape: Shape = "crystalcoder"
) -> ModelConfig:
    """A small model of a shape; at `base_width` both parametrizations agree except for the attention scale.

    Standard: matrices start at base_std / sqrt(width / base_width), as in fan-in initialization; scales and learning
    rate stay.
    """
    base_std = 0.073
    mup = Mup(
        base_hidden_size=base_width,
        distribution="truncated_normal",
        base_std=base_std,
        embedding_scale=14.6,
        base_logits_scale=2.22,
    )
    width_multiplier, num_layers = width / base_width, 2
    fan_in = Initialization(
        distribution="truncated_normal",
        embedding_std=base_std,
        matrix_std=base_std / math.sqrt(width_multiplier),
        output_matrix_std=base_std / math.sqrt(2 * width_multiplier * num_layers),
    )
    is_mup = parametrization != "standard"
    heads = width // HEAD_DIM
    config = ModelConfig(
        vocab_size=64,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=heads,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=32,
        norm="layer_norm",
        norm_eps=1e-5,
        linear_bias=True,
        rotary_dim=HEAD_DIM // 4,
        rotary_interleaved=True,
        rope_theta=10000.0,
        attention_scale="inverse_head_dim" if is_mup else "inverse_sqrt_head_dim",
        tie_embeddings=True,
        mup=mup if is_mup else None,
        initialization=None if is_mup else fan_in,
        embedding_scale=None if is_mup else mup.embedding_scale,
        logits_scale=None if is_mup else mup.base_logits_scale,
    )
    if shape == "crystalcoder":
        return config
    grouped = {"num_kv_heads": heads // 2, "qk_norm": "per_head", "rotary_dim": HEAD_DIM, "rotary_interleaved": False}
    return ModelConfig.model_validate(config.model_dump() | grouped | {"norm": "rms_norm", "linear_bias": False})


def growth(points: Sequence[ActivationSize], parametrization: Parametrization, activation: str, step: int) -> float:
    """The exponent p of change ~ width^p, by least squares on logarithms: 0 is flat, 0.5 a square root."""
    chosen = [p for p in points if (p.parametrization, p.activation, p.step) == (parametrization, activation, step)]
    x = torch.tensor([math.log(point.width) for point in chosen], dtype=torch.float64)
    y = torch.tensor([math.log(point.change) for point in chosen], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def plot(points: Sequence[ActivationSize], path: Path) -> None:
    """Write a PNG: change of each segment's output against width, log-log, one panel a parametrization.

    Needs matplotlib (`pip install weftrain[plot]`).
    """
    panels = list(dict.fromkeys(point.parametrization for point in points))
    activations = list(dict.fromkeys(point.activation for point in points))
    widths = list(dict.fromkeys(point.width for point in points))
    last = max(point.step for point in points)
    figure = new_figure(5 * len(panels), 4)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for index, activation in enumerate(activations):
            for step in range(1, last + 1):
                line = [p for p in points if (p.parametrization, p.activation, p.step) == (panel, activation, step)]
                style = {"color": f"C{index}", "alpha": 0.25 + 0.75 * step / last}
                label = activation if step == last else None
                axis.plot([p.width for p in line], [p.change for p in line], "o-", label=label, **style)
        axis.set(title=panel, xlabel="width", xscale="log", yscale="log")
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
    axes[0].set_ylabel("mean |x - x at initialisation|")
    axes[0].legend(fontsize="small", title=f"darkest: step {last}", title_fontsize="small")
    fsops.write_bytes(path, picture(figure, path.suffix))


def _muon(parametrization: Parametrization, base_width: int) -> MuonConfig | None:
    """With either scale the update of a square matrix at `base_width` is that of match_adamw."""
    if parametrization == "muon_spectral":
        return MuonConfig(scale="spectral", compute="float32", learning_rate_multiplier=0.2 * math.sqrt(base_width))
    return MuonConfig(scale="match_adamw", compute="float32") if parametrization == "muon_match_adamw" else None


class _Muon:
    """Muon's update of matrices, without decay."""

    def __init__(self, matrices: Sequence[Tensor], muon: MuonConfig, learning_rate: float) -> None:
        self._matrices, self._muon, self._rate = matrices, muon, learning_rate * muon.learning_rate_multiplier
        self._averages = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        muon, (a, b, c) = self._muon, self._muon.coefficients
        for matrix, average in zip(self._matrices, self._averages, strict=True):
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 1 - muon.momentum)
            momentum = matrix.grad.lerp(average, muon.momentum)
            direction = newton_schulz(momentum, a=a, b=b, c=c, iterations=muon.iterations, eps=muon.eps)
            matrix.sub_(direction, alpha=self._rate * muon.scale_of(tuple(matrix.shape)))


def _train(
    config: ModelConfig, steps: int, learning_rate: float, seed: int, muon: MuonConfig | None
) -> list[Mapping[str, Tensor]]:
    """Activations before each step and after the last. muon: moves the hidden matrices and nothing else, so that what
    is seen is its doing; None: AdamW moves everything.
    """
    model = Decoder(config, select(kernel_specs(config, "cpu", torch.float32), ("reference",)))
    initialize(model, config, seed)
    rows = torch.randint(
        config.vocab_size, (4, config.max_position_embeddings + 1), generator=torch.Generator().manual_seed(seed)
    )
    ids, labels = rows[:, :-1], rows[:, 1:]
    groups = _groups(model, config, learning_rate)
    optimizer: _Muon | torch.optim.Optimizer
    if muon is not None:
        optimizer = _Muon(groups[0]["params"], muon, learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0)
    measured = [_activations(model, ids)]
    for _ in range(steps):
        model.zero_grad()
        (model(ids, labels) / labels.numel()).backward()
        optimizer.step()
        measured.append(_activations(model, ids))
    return measured


def _groups(model: Decoder, config: ModelConfig, learning_rate: float) -> list[dict[str, Any]]:
    """Decoder matrices at the muP learning rate, everything else at the full one."""
    matrices = {spec.name for spec in parameter_specs(config) if spec.role in (Role.MATRIX, Role.OUTPUT_MATRIX)}
    named = list(model.named_parameters())
    return [
        {
            "params": [p for name, p in named if name in matrices],
            "lr": learning_rate * resolve_scales(config).matrix_learning_rate_multiplier,
        },
        {"params": [p for name, p in named if name not in matrices], "lr": learning_rate},
    ]


@torch.no_grad()
def _activations(model: Decoder, ids: Tensor) -> Mapping[str, Tensor]:
    embedding, *blocks, _ = model.segments()
    rotary = model.rotary(ids.shape[1])
    x = embedding(ids)
    outputs = {"embedding": x}
    for layer, block in enumerate(blocks):
        x = block(x, rotary[layer])
        outputs[f"layers.{layer}"] = x
    outputs["logits"] = model.logits(ids)
    return outputs


def main(arguments: Sequence[str]) -> None:
    """`python -m weftrain.analysis.coordinate_check PLOT.png`: run the check, print the exponents, draw the plot."""
    last = 4
    for shape in ("grouped", "crystalcoder"):
        points = coordinate_check(shape=shape)  # type: ignore[arg-type]
        print(f"{shape}: change after {last} steps ~ width^p")
        for activation in dict.fromkeys(point.activation for point in points):
            exponents = (f"{name} {growth(points, name, activation, last):+.2f}" for name in ("mup", "standard"))  # type: ignore[arg-type]
            print(f"{activation:<10} {', '.join(exponents)}")
    if arguments:
        plot(points, Path(arguments[0]))
        print(f"plot: {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
