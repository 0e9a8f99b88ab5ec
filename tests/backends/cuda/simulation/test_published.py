"""Simulated steps against published runs (docs/simulate-a-step.md has this table): one set of constants for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from weftrain.analysis.machine.devices import DEVICES, speeds
from weftrain.backends.cuda.simulation.layout import Layout
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.backends.cuda.simulation.step import simulate
from weftrain.backends.cuda.simulation.work import Program
from weftrain.core.recipe_file import load_recipe


class Published(NamedTuple):
    recipe: str
    overrides: tuple[str, ...]
    layout: Layout
    program: Program
    device: str
    per_node: int
    network: float  # bytes/s of a device to other nodes
    rate: int  # tokens/s a device
    worst: float  # the largest error, either way
    of_device: Mapping[str, float] = MappingProxyType({})  # where it is another one than the data sheet's


def batch(micro: int, replicas: int, of_all: int) -> tuple[str, ...]:
    return (
        f"batch.micro_batch_size={micro}",
        f"batch.replicas={replicas}",
        f"batch.global_batch_size={of_all}",
    )


LONG = ("data.sequence_length=4096", "model.max_position_embeddings=4096")
NONE, BF16 = (0.0, 0.0, 0.0), 2
# FSDP1 gathers into one flat buffer, without copies; 400 and 800 Gb/s a node
FMS = Program("eager", stream_item=BF16, reduce_item=2, copies=False)
FMS_COMPILED = dataclasses.replace(FMS, fusion="compiled")
# every second product is computed again, and all elementwise passes
TITAN = Program("eager", stream_item=BF16, recomputed=(0.5, 0.0, 1.0))
TITAN_COMPILED = dataclasses.replace(TITAN, fusion="compiled")
# H100 with HBM2e and 500 W: "the actual peak is between SXM and NVL", 989 and 835 TFLOP/s: the middle
HBM2E = {"matmul_flops": 912e12, "memory_bandwidth": 2400e9}
OLMO = Program("compiled", stream_item=BF16)
RUNS = {
    # arXiv 2312.06550: 582.4k tokens/s on 56 nodes of 4; 2 x 200 Gb/s a node; fp32 weights gathered under autocast
    "Amber-7B, 224 A100": Published(
        "amber_7b",
        (),
        Layout(shard=224),
        Program("eager", recomputed=(1.0, 1.0, 1.0), gather_item=4),
        "A100-80GB",
        4,
        12.5e9,
        2600,
        0.25,
    ),
    # pytorch.org/blog/maximizing-training and maximizing-training-throughput; fms-fsdp's README
    "fms-fsdp 7B, 128 A100": Published(
        "amber_7b", (*LONG, *batch(2, 128, 256)), Layout(16, 8), FMS, "A100-80GB", 8, 6.25e9, 3700, 0.10
    ),
    "fms-fsdp 7B, 128 A100, compiled": Published(
        "amber_7b", (*LONG, *batch(2, 128, 256)), Layout(16, 8), FMS_COMPILED, "A100-80GB", 8, 6.25e9, 4480, 0.10
    ),
    "fms-fsdp 7B, 96 H100": Published(
        "amber_7b", (*LONG, *batch(2, 96, 192)), Layout(12, 8), FMS, "H100", 8, 12.5e9, 7500, 0.20
    ),
    "fms-fsdp 7B, 96 H100, compiled": Published(
        "amber_7b", (*LONG, *batch(2, 96, 192)), Layout(12, 8), FMS_COMPILED, "H100", 8, 12.5e9, 9600, 0.10
    ),
    # github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3 (arXiv 2410.06511)
    "torchtitan 8B, 8 H100": Published(
        "llama31_8b", batch(2, 8, 16), Layout(shard=8), TITAN, "H100", 8, 50e9, 5762, 0.10, HBM2E
    ),
    "torchtitan 8B, 8 H100, compiled": Published(
        "llama31_8b", batch(2, 8, 16), Layout(shard=8), TITAN_COMPILED, "H100", 8, 50e9, 6667, 0.10, HBM2E
    ),
    "torchtitan 8B, 128 H100": Published(
        "llama31_8b", batch(2, 128, 256), Layout(shard=128), TITAN, "H100", 8, 50e9, 5605, 0.10, HBM2E
    ),
    "torchtitan 8B, 128 H100, compiled": Published(
        "llama31_8b", batch(2, 128, 256), Layout(shard=128), TITAN_COMPILED, "H100", 8, 50e9, 6514, 0.10, HBM2E
    ),
    # arXiv 2512.13961, table 34: 64 x 8 and 16 x 8 ranks, 200 Gb/s a device
    "Olmo 3 7B, 512 H100": Published("olmo3_7b", batch(1, 512, 512), Layout(64, 8), OLMO, "H100", 8, 25e9, 7700, 0.10),
    "Olmo 3 7B, mid-training, 128 H100": Published(
        "olmo3_7b", batch(2, 128, 256), Layout(16, 8), OLMO, "H100", 8, 25e9, 8500, 0.10
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_against_published_runs(name: str) -> None:
    run = RUNS[name]
    recipe = load_recipe(run.recipe, list(run.overrides), "cuda").recipe
    machine = speeds(run.layout.size, DEVICES[run.device], run.per_node)
    machine = dataclasses.replace(machine, link_bandwidth=run.network, **run.of_device)
    found = simulate(recipe, run.layout, run.program, Rates.of(machine))
    rate = recipe.tokens_per_step / found.step_s / run.layout.size
    print(f"| {name} | {rate:,.0f} | {run.rate:,} | {rate / run.rate - 1:+.1%} |")
    assert abs(rate / run.rate - 1) < run.worst


def test_k2_as_released_fits_and_waits() -> None:
    """TP 8 x PP 4 x DP 15, micro-batches of 4, no recomputation, gradients summed at the end: no speed was published.
    A pipeline of 4 with 34 micro-batches waits 3 / 37 of its step.
    """
    recipe = load_recipe("k2_65b", [], "cuda").recipe
    layout = Layout(15, tensor=8, pipeline=4, whole=True, overlaps=False)
    found = simulate(recipe, layout, Program("eager", stream_item=2), Rates.of(speeds(480, DEVICES["A100-80GB"])))
    assert found.micro_batches == 34
    assert found.bubble == pytest.approx(3 / 37, rel=0.15)
    assert max(memory.peak_bytes for memory in found.memory) < 80e9 * 1.05
