"""What a run in one process on one device needs, and how long its step takes, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from weftrain.backends.common.device import torch_device
from weftrain.backends.common.device_memory import (
    Sizes,
    alone_needs,
    available,
    largest_micro_batch,
    remedies,
)
from weftrain.core.config import Recipe, RecomputeOption
from weftrain.core.errors import BackendError
from weftrain.core.flops import training_flops
from weftrain.core.formats.units import gib
from weftrain.core.muon import muon_flops
from weftrain.core.prediction import Needs, Prediction, Speeds

# Model FLOP/s over the measured peak, in the steps of bench_70m on two cores: 0.79 in bf16, 0.74 in fp32.
MATMUL_SHARE_ON_CPU = 0.75
UPDATE_BYTES = 28.0  # of the host's memory that pass in the update of a parameter


def predict_alone(
    recipe: Recipe,
    options: RecomputeOption,
    compiled: bool,
    device: str,
    speeds: Speeds,
    on_gpu: Callable[[Recipe, Speeds], Prediction],
) -> Prediction:
    """See Predictor.predict. device: the option; with speeds.devices, of one GPU by name. on_gpu: predicts the step
    of one GPU. Raises BackendError for several devices.
    """
    if speeds.devices not in (None, 1) or recipe.batch.replicas != 1:
        raise BackendError(
            "this backend computes on one device: give --devices 1xNAME and batch.replicas=1, or --backend cuda"
        )
    recomputes = options.activation_checkpointing
    if speeds.devices is None:
        where = torch_device(device)
        capacity, device_type = available(where, 1)[0], where.type
    else:
        capacity, device_type = speeds.capacity_bytes or 0.0, "cuda"
    parts = alone_needs(recipe, recomputes, compiled, device_type)
    if device_type == "cuda":
        found = on_gpu(recipe, speeds)
        times = {name: seconds for name, seconds in found.parts.items() if name != "communication"}
        step_s, limit = found.step_s, found.limit
    else:
        times, step_s, limit = _on_cpu(recipe, recomputes, speeds)
    needed = partial(_total, recomputes=recomputes, compiled=compiled, device_type=device_type)
    most = largest_micro_batch(recipe, needed, capacity)
    found = Prediction(step_s, limit, times, Needs(parts, 0), capacity_bytes=capacity, largest_micro_batch=most)
    if found.fits:
        return found
    return replace(found, remedies=remedies(recipe, recomputes, compiled, device_type, capacity))


def outline_alone(recipe: Recipe, options: RecomputeOption, compiled: bool, device: str) -> list[str]:
    """See Predictor.outline."""
    parts = alone_needs(recipe, options.activation_checkpointing, compiled, torch_device(device).type)
    listed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return [f"memory       {listed} = {gib(sum(parts.values()))}"]


def _total(recipe: Recipe, recomputes: str, compiled: bool, device_type: str) -> int:
    return sum(alone_needs(recipe, recomputes, compiled, device_type).values())


def _on_cpu(recipe: Recipe, recomputes: str, speeds: Speeds) -> tuple[dict[str, float], float, str]:
    """Seconds by part, of the step, and its limit; computation and update follow one another."""
    flops = training_flops(recipe).total * recipe.tokens_per_step
    times = {
        "compute": flops * (4 / 3 if recomputes == "full" else 1.0) / (speeds.matmul_flops * MATMUL_SHARE_ON_CPU),
        "optimizer": sum(Sizes.of(recipe, "exp_avg")) * UPDATE_BYTES / speeds.memory_bandwidth
        + muon_flops(recipe.parameters, recipe.optimizer.muon) / (speeds.matmul_flops * MATMUL_SHARE_ON_CPU),
    }
    return times, sum(times.values()), max(times, key=lambda name: times[name])
