"""Simulated steps: cases with an answer by hand, sums that must hold, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from weftrain.analysis.machine.devices import DEVICES, speeds
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.simulation import step as step_module
from weftrain.backends.cuda.simulation.events import MOST_TASKS, REPLICATE, SHARD
from weftrain.backends.cuda.simulation.layout import Layout, layout_of, program_of, stages_of
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.backends.cuda.simulation.step import SLOWED, Simulated, StepTasks, simulate
from weftrain.backends.cuda.simulation.work import Program
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.flops import training_flops
from weftrain.core.prediction import KernelShares
from weftrain.core.recipe_file import load_recipe

LAST = 1e18  # bytes/s of links that take no time
# without tiles, so that seconds are FLOPs / rate, and computation loses nothing beside collectives
IDEAL = Rates(
    1e14, KernelShares(1.0, 1.0, 1.0, 1), LAST, LAST, LAST, 8, node_hop_s=0.0, network_hop_s=0.0, kernel_s=0.0
)
NO_COPIES = Program(copies=False)


def recipe(micro: int = 1, replicas: int = 1, batch: int = 1, layers: int = 8, *more: str) -> Recipe:
    """Llama-3.2-1B's width, with a small vocabulary."""
    changes = [f"batch.micro_batch_size={micro}", f"batch.replicas={replicas}", f"batch.global_batch_size={batch}"]
    changes += [f"model.num_layers={layers}", "model.vocab_size=128", "data.sequence_length=2048", *more]
    return load_recipe("llama32_1b", changes, "cuda").recipe


def on(device: str, count: int, **changes: float) -> Rates:
    return Rates.of(dataclasses.replace(speeds(count, DEVICES[device]), **changes))


def computed(found: Simulated, device: int = 0) -> float:
    waits = (*step_module.WAITS, SLOWED)
    return sum(seconds for kind, seconds in found.devices[device].items() if kind not in waits)


def test_one_device_takes_as_long_as_its_products() -> None:
    """Without memory traffic: the FLOPs of the recipe, of attention those under the mask, with 7 products for 6."""
    one = recipe()
    found = simulate(one, Layout(), NO_COPIES, IDEAL)
    products = training_flops(one, 0).total
    attention = (training_flops(one).total - products) / 2 * 7 / 6
    assert found.step_s == pytest.approx((products + attention) * 2048 / 1e14, rel=1e-6)
    assert found.step_s == pytest.approx(computed(found))
    assert found.bubble == 0


def of_experts(*more: str) -> Recipe:
    """Two layers of OLMoE's width, of which each token passes through 8 of 64 experts."""
    changes = ["model.num_layers=2", "model.vocab_size=128", "data.sequence_length=2048", "batch.micro_batch_size=1"]
    return load_recipe("olmoe_1b_7b", [*changes, *more], "cuda").recipe


@pytest.mark.parametrize("more", [[], ["model.experts.dense_layers=1", "model.experts.shared=2"]])
def test_experts_take_as_long_as_their_products(more: list[str]) -> None:
    """The FLOPs of the recipe count the router, the shared experts and those that a token passes through."""
    one = of_experts("batch.replicas=1", "batch.global_batch_size=1", *more)
    products = training_flops(one, 0).total
    attention = (training_flops(one).total - products) / 2 * 7 / 6
    found = simulate(one, Layout(), NO_COPIES, IDEAL)
    assert found.step_s == pytest.approx((products + attention) * 2048 / 1e14, rel=1e-5)  # the rest moves rows


def test_tokens_of_experts_on_the_link_by_hand() -> None:
    """Four ranks with 16 experts each: 8 rows of bf16 a token leave and come back, forward and backward, of which a
    quarter stays; nobody gathers experts, and all sum the gradients of the others.
    """
    four = of_experts("batch.replicas=4", "batch.global_batch_size=4")
    rates = dataclasses.replace(IDEAL, node_bandwidth=1e9, node_share=1.0)
    layout = Layout(shard=4, expert=4)
    found = simulate(four, layout, NO_COPIES, rates)
    a_layer = 4 * 3 / 4 * 2 * 2048 * 8 * 2048
    assert found.links[0]["expert"] == pytest.approx(2 * a_layer / 1e9)
    assert found.devices[0]["expert ranks"] == pytest.approx(found.links[0]["expert"], rel=0.01)  # nothing hides it
    sizes = StepTasks(four, layout, NO_COPIES, rates, 1).sizes
    assert sum(sizes.experts) == 2 * 64 * 3 * 1024 * 2048
    outer = sizes.embedding + sizes.head
    moved = 3 / 4 * (2 * (2 * sum(sizes.layers) + outer) + 4 * (sum(sizes.layers) + outer))
    assert found.links[0][SHARD] == pytest.approx(moved / 1e9)
    again = simulate(four, layout, Program(copies=False, recomputed=(1.0, 1.0, 1.0)), rates)
    assert again.links[0]["expert"] == pytest.approx(1.5 * found.links[0]["expert"])


def test_few_rows_an_expert_fill_tiles_badly() -> None:
    """64 experts of 8 rows each take longer than one product of as many rows, and one expert as long."""
    rates = on("H100", 1)
    assert rates.grouped_s(64, 8, 1024, 2048, 2) > 2 * rates.matmul_s(512, 1024, 2048, 2)
    assert rates.grouped_s(1, 512, 1024, 2048, 2) == rates.matmul_s(512, 1024, 2048, 2)
    full = rates.grouped_s(64, 1024, 1024, 2048, 2)  # as many tiles as one product of all rows has
    assert full == pytest.approx(rates.matmul_s(64 * 1024, 1024, 2048, 2))


def test_overlapped_gathers_cost_nothing_and_slow_ones_everything() -> None:
    eight = recipe(1, 8, 8)
    alone = simulate(recipe(), Layout(), NO_COPIES, IDEAL).step_s
    fast = simulate(eight, Layout(shard=8), NO_COPIES, IDEAL)
    assert fast.step_s == pytest.approx(alone, rel=1e-6)
    # half as fast as would hide them: no step is shorter than its link is busy
    slow = simulate(eight, Layout(shard=8), NO_COPIES, dataclasses.replace(IDEAL, node_bandwidth=1e9))
    assert slow.links[0][SHARD] < slow.step_s < slow.links[0][SHARD] + alone
    assert slow.devices[0]["weights and gradients"] > 0.8 * slow.step_s


def test_bytes_on_links_by_hand() -> None:
    """Two replicas of four shards: forward and backward gather bf16, gradients are fp32, and a sum passes twice."""
    eight = recipe(1, 8, 8)
    rates = dataclasses.replace(IDEAL, node_bandwidth=1e9, network_bandwidth=1e9, node_share=1.0, network_share=1.0)
    found = simulate(eight, Layout(2, 4), NO_COPIES, rates)
    blocks = sum(StepTasks(eight, Layout(2, 4), NO_COPIES, rates, 1).sizes.layers)
    outer = 128 * 2048  # tied
    gathered = 3 / 4 * 2 * (2 * blocks + outer)
    assert found.links[0][SHARD] == pytest.approx((gathered + 3 / 4 * 4 * (blocks + outer)) / 1e9)
    assert found.links[0][REPLICATE] == pytest.approx(2 * 1 / 2 * (blocks + outer) / 1e9)  # a quarter of 4 bytes


@pytest.mark.parametrize(("reshard", "times"), [(True, 2), (False, 1)])
def test_a_pipeline_gathers_its_weights_for_every_micro_batch(reshard: bool, times: int) -> None:
    """Blocks for each forward and each backward. Embedding or head are kept until a backward has passed: the first of
    two stages does two forwards with one gather, its last backward has one by itself.
    """
    many = recipe(1, 2, 8, 8, "model.tie_embeddings=false")
    rates = dataclasses.replace(IDEAL, node_bandwidth=1e9, node_share=1.0)
    found = simulate(many, Layout(shard=2, pipeline=2, reshard=reshard), NO_COPIES, rates)
    sizes = StepTasks(many, Layout(shard=2, pipeline=2), NO_COPIES, rates, 4).sizes
    blocks, outer = sum(sizes.layers[:4]), 128 * 2048
    gathered = 2 * (4 * times * blocks + 4 * outer)
    assert found.links[0][SHARD] == pytest.approx(1 / 2 * (gathered + 4 * (blocks + outer)) / 1e9)


@pytest.mark.parametrize(("stages", "count"), [(2, 2), (4, 8)])
def test_the_bubble_of_a_pipeline(stages: int, count: int) -> None:
    """(p - 1) / (m + p - 1), but for a head of 128 ids and the optimizer."""
    found = simulate(recipe(1, 1, count), Layout(pipeline=stages), NO_COPIES, IDEAL)
    assert found.bubble == pytest.approx((stages - 1) / (count + stages - 1), rel=0.01)
    both = simulate(recipe(1, 1, count), Layout(pipeline=stages, schedule="gpipe"), NO_COPIES, IDEAL)
    assert both.step_s == pytest.approx(found.step_s, rel=0.01)
    more = both.memory[0].peak["activations"] / found.memory[0].peak["activations"]
    assert more == pytest.approx(count / min(stages, count), rel=0.07)  # a layer of the last is freed already


def test_schedules_that_wait_less() -> None:
    def step_s(**more: object) -> float:
        return simulate(recipe(1, 1, 8), Layout(pipeline=4, **more), NO_COPIES, IDEAL).step_s  # type: ignore[arg-type]

    zero, v_shaped = step_s(schedule="interleaved_zero_bubble"), step_s(schedule="zbv", chunks=2)
    assert v_shaped < zero < step_s(schedule="interleaved_1f1b", chunks=2) < step_s()


EXPERTS = [
    Layout(),
    Layout(shard=8, expert=4),
    Layout(2, 4, expert=4),
    Layout(replicate=4, whole=True),
    Layout(shard=2, pipeline=2, expert=2),
    Layout(2, pipeline=2, schedule="zbv", chunks=2, whole=True),
]
LAYOUTS = [
    Layout(),
    Layout(shard=8),
    Layout(2, 4),
    Layout(replicate=8, whole=True),
    Layout(shard=2, tensor=4),
    Layout(shard=2, context=4),
    Layout(2, 2, pipeline=2),
    Layout(2, pipeline=4, whole=True, overlaps=False),
    Layout(pipeline=4, tensor=2, schedule="interleaved_1f1b", chunks=2),
    Layout(2, pipeline=4, schedule="interleaved_zero_bubble", whole=True),
    Layout(2, pipeline=4, schedule="zbv", chunks=2, whole=True),
    Layout(shard=2, pipeline=2, reshard=False),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recomputed", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_every_second_and_every_byte_is_accounted_for(layout: Layout, recomputed: tuple[float, float, float]) -> None:
    """Each device's times add up to the step. No part of the memory goes below 0, and what is left is the state and
    the rank's own gradients.
    """
    data = layout.replicate * layout.shard
    eight = recipe(1, data, 8 * data)
    accounts_for_all(eight, layout, Program(recomputed=recomputed))


@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize("recomputed", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_the_same_of_experts(layout: Layout, recomputed: tuple[float, float, float]) -> None:
    data = layout.replicate * layout.shard
    eight = of_experts(f"batch.replicas={data}", f"batch.global_batch_size={8 * data}", "model.num_layers=4")
    accounts_for_all(eight, layout, Program(recomputed=recomputed))


def accounts_for_all(eight: Recipe, layout: Layout, program: Program) -> None:
    rates = on("H100", layout.size)
    found = simulate(eight, layout, program, rates)
    for device, times in enumerate(found.devices):
        assert sum(times.values()) == pytest.approx(found.step_s)
        assert min(times.values()) >= -1e-9
        at = [time for time, _ in found.memory[device].curve]
        assert at == sorted(at)
    steps = StepTasks(eight, layout, program, rates, 8)
    for chain in steps.chains:
        left: dict[str, int] = {}
        for task in steps.tasks:
            if task.device == chain.number:
                for change, sign in ((task.takes, 1), (task.frees, -1)):
                    for part, size in change.items():
                        left[part] = left.get(part, 0) + sign * size
        assert {part for part, size in left.items() if size} <= {"gradients"}
        assert min(left.values()) >= 0


def test_faster_parts_make_no_slower_step() -> None:
    eight = recipe(2, 16, 64)
    base = simulate(eight, Layout(2, 8), Program(), on("H100", 16))
    for changes in (
        {"matmul_flops": 2e15},
        {"memory_bandwidth": 1e13},
        {"link_bandwidth": 1e12},
        {"node_link_bandwidth": 1e12},
    ):
        assert simulate(eight, Layout(2, 8), Program(), on("H100", 16, **changes)).step_s <= base.step_s
    slow = simulate(eight, Layout(2, 8), Program(), on("H100", 16, link_bandwidth=1e9))
    assert slow.step_s > 1.5 * base.step_s
    more = simulate(recipe(2, 16, 96), Layout(2, 8), Program(), on("H100", 16))
    assert base.step_s < more.step_s < 1.6 * base.step_s
    again = simulate(eight, Layout(2, 8), Program(recomputed=(1.0, 1.0, 1.0)), on("H100", 16))
    assert base.step_s < again.step_s < 4 / 3 * base.step_s
    assert again.memory[0].peak["activations"] < 0.3 * base.memory[0].peak["activations"]


@pytest.mark.parametrize(
    "layout",
    [Layout(shard=8), Layout(shard=2, pipeline=4), Layout(pipeline=4, schedule="interleaved_1f1b", chunks=2)],
)
def test_micro_batches_that_are_not_simulated_take_as_long(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    data = layout.replicate * layout.shard
    many = recipe(1, data, 48 * data)
    whole = simulate(many, layout, Program(), on("H100", layout.size))
    assert whole.simulated_micro_batches == whole.micro_batches == 48
    monkeypatch.setattr(step_module, "MOST_SIMULATED", 10)
    short = simulate(many, layout, Program(), on("H100", layout.size))
    assert short.simulated_micro_batches < 40
    assert (short.micro_batches, short.step_s) == (48, pytest.approx(whole.step_s, rel=0.002))
    for some, every in zip(short.devices, whole.devices, strict=True):
        assert sum(some.values()) == pytest.approx(short.step_s)
        assert some["matrix products"] == pytest.approx(every["matrix products"])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8, 512),
        Layout(32, tensor=8, pipeline=16, whole=True),
        Layout(16, 2, tensor=8, pipeline=16, schedule="interleaved_1f1b", chunks=5),
    ],
)
def test_4096_devices_are_as_many_tasks_as_one_of_each_stage_has(layout: Layout) -> None:
    """K2's 80 layers; 256 micro-batches each."""
    assert layout.size == 4096
    data = layout.replicate * layout.shard
    big = load_recipe("k2_65b", [f"batch.replicas={data}", f"batch.global_batch_size={1024 * data}"], "cuda").recipe
    found = simulate(big, layout, Program(), on("H100", 4096))
    assert found.micro_batches == 256
    assert len(found.tasks) < 100_000 < MOST_TASKS
    assert len(found.devices) == layout.pipeline


@pytest.mark.parametrize(
    ("name", "shape"),
    [("amber_7b", Degrees(1, 224, 1, 1)), ("olmoe_1b_7b", Degrees(1, 128, 1, 1, expert=8))],
)
def test_memory_as_the_planner_has_it(name: str, shape: Degrees) -> None:
    """Which takes the worst of five moments, where this one follows each task."""
    batch = [f"batch.replicas={shape.data}", f"batch.global_batch_size={4 * shape.data}", "batch.micro_batch_size=2"]
    one = load_recipe(name, [] if name == "amber_7b" else batch, "cuda").recipe
    options = CudaOptions.model_validate({"activation_checkpointing": "full", "expert_parallel": shape.expert})
    found = simulate(one, layout_of(one, options, shape), program_of(one, options), on("A100-80GB", shape.size))
    planned = needs(one, options, shape, "cuda").memory_bytes
    total = sum(size for part, size in planned.items() if part != "fragments")
    assert found.memory[0].peak_bytes == pytest.approx(total, rel=0.06)
    assert found.memory[0].peak["activations"] == pytest.approx(planned["activations"], rel=0.07)


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ([], Layout(pipeline=9), "8 layers are fewer than the 9 pipeline stages: use 8 stages or fewer"),
        ([], Layout(pipeline=4), "1 micro-batches are fewer than the 4 pipeline stages"),
        ([], Layout(shard=3), "3 replicas of micro-batches of 1 do not divide it: change batch.micro_batch_size"),
    ],
)
def test_layouts_that_are_refused(changes: list[str], layout: Layout, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        simulate(recipe(), layout, Program(), on("H100", layout.size))


def test_what_is_not_simulated_is_refused() -> None:
    for name in ("cpu_offload", "float8"):
        with pytest.raises(BackendError, match=rf"backend.options.{name} is not simulated"):
            layout_of(recipe(), CudaOptions.model_validate({name: True}), Degrees(1, 8, 1, 1))
    alone = dataclasses.replace(IDEAL, node_bandwidth=None, network_bandwidth=None)
    with pytest.raises(BackendError, match="needs the speed of the links"):
        simulate(recipe(1, 8, 8), Layout(shard=8), Program(), alone)


def test_stages_are_as_even_as_they_can_be() -> None:
    assert stages_of(10, Layout(pipeline=4)) == [range(3), range(3, 6), range(6, 8), range(8, 10)]


def test_the_layers_of_a_pipeline_are_those_that_the_backend_gives_its_ranks() -> None:
    """As pipeline_layers says, or with fewer on the stage that has the head."""
    options = CudaOptions.model_validate({"pipeline_parallel": 2, "pipeline_layers": [6, 2]})
    layout = layout_of(recipe(), options, Degrees(1, 1, 1, 1, pipeline=2))
    assert (layout.layers, layout.schedule) == ((6, 2), "1f1b")
    assert stages_of(8, layout) == [range(6), range(6, 8)]
    untied = load_recipe("llama31_8b").recipe
    chosen = layout_of(untied, CudaOptions.model_validate({"pipeline_parallel": 4}), Degrees(1, 1, 1, 1, pipeline=4))
    assert chosen.layers is not None
    assert (sum(chosen.layers), min(chosen.layers)) == (32, chosen.layers[-1])
