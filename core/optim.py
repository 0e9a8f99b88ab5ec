"""Optimizer and schedule as data: parameter groups by role, and the learning rate as a pure function of the step.

The update itself is the op `adamw` in kernels/. `learning_rate(schedule, step)` takes the 0-based index of the step
about to be made, so a warm-up from 0 makes its first update with a learning rate of exactly 0, as both models did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from weftrain.core.config import OptimizerConfig, ScheduleConfig
from weftrain.core.model_config import ModelConfig
from weftrain.core.muon import with_muon
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role
from weftrain.core.tuning import TuningConfig, rule_of_each, tuned_specs

# The muP learning-rate multiplier applies to decoder matrices alone: CrystalCoder trains its embedding, norms and all
# biases at the full learning rate (released params file, adjust_learning_rate.decoder_kernel).
GROUP_OF_ROLE = {
    Role.EMBEDDING: "embeddings",
    Role.HEAD: "embeddings",
    Role.MATRIX: "decoder_matrices",
    Role.OUTPUT_MATRIX: "decoder_matrices",
    Role.ROUTER: "decoder_matrices",
    Role.NORM_WEIGHT: "norms_and_biases",
    Role.NORM_BIAS: "norms_and_biases",
    Role.BIAS: "norms_and_biases",
    Role.LORA_A: "adapters",
    Role.LORA_B: "adapters",
}
_MUONS = "muon_matrices"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters (canonical names, in execution order) that share an optimizer, a learning-rate multiplier and a
    weight decay.
    """

    name: str
    parameters: tuple[str, ...]
    learning_rate_multiplier: float
    weight_decay: float
    optimizer: Literal["adamw", "muon"] = "adamw"


def parameter_groups(
    model: ModelConfig, optimizer: OptimizerConfig, tuning: TuningConfig | None = None
) -> tuple[ParameterGroup, ...]:
    """Every trained parameter in exactly one group; groups without parameters are left out.

    A group is cut into those that a rule of tuning.learning_rates names, `decoder_matrices.rule_0`, and the rest.
    muP's multiplier of matrices follows from AdamW's updates: Muon's have optimizer.muon.scale.
    """
    tuning = TuningConfig() if tuning is None else tuning
    specs = with_muon(tuned_specs(model, tuning), optimizer.muon)
    rules, multipliers = rule_of_each(specs, tuning.learning_rates), resolve_scales(model)
    names = ("embeddings", "decoder_matrices", "norms_and_biases", "adapters", _MUONS)
    members: dict[tuple[str, int], list[str]] = {
        (name, rule): [] for name in names for rule in range(-1, len(tuning.learning_rates))
    }
    for spec in specs:
        if spec.trained:
            group = GROUP_OF_ROLE[spec.role] if spec.optimizer == "adamw" else _MUONS
            members[group, rules.get(spec.name, -1)].append(spec.name)
    found = []
    for (name, rule), parameters in members.items():
        multiplier = multipliers.matrix_learning_rate_multiplier if name == "decoder_matrices" else 1.0
        if name == _MUONS and optimizer.muon is not None:
            multiplier = optimizer.muon.learning_rate_multiplier
        decays = optimizer.decay == "all" or name != "norms_and_biases"
        if rule >= 0:
            multiplier *= tuning.learning_rates[rule].multiplier
        if parameters:
            of_rule = f".rule_{rule}" if rule >= 0 else ""
            decay = optimizer.weight_decay if decays else 0.0
            kind: Literal["adamw", "muon"] = "muon" if name == _MUONS else "adamw"
            found.append(ParameterGroup(f"{name}{of_rule}", tuple(parameters), multiplier, decay, kind))
    return tuple(found)


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
    """The base learning rate of 0-based step `step`. Raises IndexError beyond the segments.

    With x from 0 to 1 over a segment, one_minus_sqrt has fallen by sqrt(x) of the whole, the decay after a constant
    rate that arXiv 2405.18392 (section 3) found better than a linear one; sqrt has sqrt(1 - x) of it left. inverse_sqrt
    falls as in arXiv 1706.03762 (section 5.3, equation 3), in proportion to 1 / sqrt(step), through both ends; arXiv
    2106.04560 trains with it for any length, and lets it fall to zero in a last segment.
    """
    first = 0
    for segment in schedule.learning_rate:
        if step < first + segment.steps:
            done = (step - first) / segment.steps
            if segment.end is None:
                return segment.start
            match segment.shape:
                case "cosine":
                    done = (1 - math.cos(math.pi * done)) / 2
                case "one_minus_sqrt":
                    done = math.sqrt(done)
                case "sqrt":
                    done = 1 - math.sqrt(1 - done)
                case "inverse_sqrt":  # 1 / rate^2 grows in proportion to the steps
                    return 1 / math.sqrt((1 - done) / segment.start**2 + done / segment.end**2)
            return segment.start + (segment.end - segment.start) * done
        first += segment.steps
    raise IndexError(f"step {step} lies beyond the learning-rate schedule, which covers {first} steps")


def group_learning_rates(
    groups: tuple[ParameterGroup, ...], schedule: ScheduleConfig, step: int
) -> Mapping[str, float]:
    """Parameter group -> its learning rate at 0-based step `step`."""
    base = learning_rate(schedule, step)
    return {group.name: base * group.learning_rate_multiplier for group in groups}


def beta_power(beta: float, updates: int) -> np.float32:
    """beta ** (updates + 1) as the vendor's AdamW holds it: multiplied up in fp32, one rounding a step."""
    factor = power = np.float32(beta)
    for _ in range(updates):
        following = power * factor
        if following == power:  # zero, or the last denormal, which rounds to itself
            break
        power = following
    return power
