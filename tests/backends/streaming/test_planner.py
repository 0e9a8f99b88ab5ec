"""What a run needs and how long a step takes, and what the outline draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from families import FAMILIES
from places import ROOT
from streaming_runs import saved_by_a_block

from weftrain.analysis.machine.devices import DEVICES
from weftrain.analysis.machine.devices import speeds as device_speeds
from weftrain.backends.streaming.needs import kept_by_a_block, needs, place, remedies
from weftrain.backends.streaming.options import StreamingOptions, layer_slots, layout_of
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.planner import predict
from weftrain.core.config import Recipe
from weftrain.core.parameters import flops_per_token
from weftrain.core.prediction import Needs, Prediction, Speeds
from weftrain.core.recipe_file import load_recipe


def options(**chosen: Any) -> StreamingOptions:
    return StreamingOptions.model_validate({"tile_elements": 4096, **chosen})


def needed(recipe: Recipe, chosen: StreamingOptions) -> Needs:
    layout = layout_of(recipe, chosen)
    return needs(recipe, chosen, layout, Placement(layer_slots(recipe, chosen)))


def test_needs_follow_the_options() -> None:
    recipe = load_recipe("bench_70m", ["precision.compute=float32"]).recipe

    def total(**chosen: Any) -> int:
        chosen_options = StreamingOptions.model_validate({"buffer_mib": 64, **chosen})
        return needed(recipe, chosen_options).total_memory_bytes

    assert total(tier="direct") < total(tier="ram") - 600e6
    assert total(tier="direct", activations="recompute") < total(tier="direct")
    assert total(tier="direct", layer_slots=2) < total(tier="direct", layer_slots=6)
    assert needed(recipe, options()).disk_bytes == 0
    assert "tier=direct" in remedies(recipe, options())
    assert remedies(
        load_recipe("bench_70m", ["batch.micro_batch_size=1"]).recipe,
        options(tier="direct", activations="recompute", layer_slots=2, buffer_mib=1),
    ) == ("a smaller model, or a machine with more memory")


def test_the_limit_of_a_prediction_is_the_slowest() -> None:
    recipe = load_recipe("bench_70m").recipe
    chosen = StreamingOptions(tier="direct")

    def limit(**changes: float) -> str:
        speeds = Speeds(**{"matmul_flops": 4e11, "memory_bandwidth": 5e10, "disk_bandwidth": 5e9, **changes})
        found = predict(recipe, chosen, speeds)
        assert found.step_s >= max(value for name, value in found.parts.items() if name != "first record")
        return found.limit

    assert limit() == "compute"
    assert limit(disk_bandwidth=1e8) == "disk"
    assert limit(matmul_flops=1e15, memory_bandwidth=1e9, disk_bandwidth=1e12) == "memory"
    compute = predict(recipe, chosen, Speeds(4e11, 5e10, 5e9)).parts["compute"]
    assert compute == pytest.approx(363_724_800 * 1024 / (4e11 * 0.75))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.ours.experts is None])
def test_no_family_keeps_more_of_a_block_than_is_counted(name: str, tiny_recipe: Callable[..., Recipe]) -> None:
    """And none keeps much less, so that the count follows heads, their size and the feed-forward."""
    recipe = tiny_recipe("amber")
    recipe = recipe.model_copy(update={"model": FAMILIES[name].ours})
    share = saved_by_a_block(recipe) / (8 * 13 * kept_by_a_block(recipe.model, 13, 4))
    assert 0.75 < share <= 1


SHAPES = {
    "7B": (),
    "13B": ("hidden_size=5120", "num_layers=40", "num_heads=40", "intermediate_size=13824"),
    "32B": (
        *("hidden_size=5120", "num_layers=64", "num_heads=40", "num_kv_heads=8", "intermediate_size=27648"),
        "vocab_size=152064",
    ),
}
# device, GB of host memory, model, rows of 2,048 tokens in a step and in a micro-batch, tier, state format
ONE_GPU = [
    ("H200", 128, "7B", 32, 4, "ram", "fp32"),
    ("H200", 128, "13B", 32, 4, "ram", "bf16_moments"),
    ("H200", 128, "13B", 16, 16, "ram", "fp32"),
    ("H200", 128, "32B", 16, 4, "direct", "fp32"),
    ("H100", 256, "7B", 32, 4, "ram", "fp32"),
    ("H100", 256, "13B", 16, 4, "ram", "fp32"),
    ("H100", 256, "32B", 8, 8, "ram", "int8_moments"),
    ("H100", 256, "32B", 8, 8, "direct", "fp32"),
]


def on_one_gpu(
    device: str, host: int, name: str, rows: int, micro: int, tier: str, form: str
) -> tuple[str, Prediction, float]:
    """A row of the table in docs/weight-streaming.md, the prediction, and model TFLOP/s."""
    batch = ["batch.replicas=1", f"batch.global_batch_size={rows}", f"batch.micro_batch_size={micro}"]
    recipe = load_recipe("amber_7b", [*batch, *(f"model.{item}" for item in SHAPES[name])]).recipe
    chosen = StreamingOptions.model_validate(
        {"tier": tier, "state_format": form, "activations": "recompute", "memory_limit_mib": int(host * 954 * 0.96)}
    )
    found = predict(recipe, chosen, replace(device_speeds(1, DEVICES[device]), disk_bandwidth=7e9))
    layout = layout_of(recipe, chosen)
    assert found.device_capacity_bytes is not None
    kept = place(recipe, chosen, layout, "cuda", int(found.device_capacity_bytes)).states
    layers = sum(record.index in kept for record in layout.records[1:-1])
    tokens = recipe.tokens_per_step / found.step_s
    rate = tokens * flops_per_token(recipe.model, 2048) / 1e12
    needed = f"{found.needs.total_device_bytes / 1e9:.0f} + {found.needs.total_memory_bytes / 1e9:.0f} GB"
    line = (
        f"| {device}, {host} GB | {name} | {rows} / {micro} | `{tier}`, `{form}` | "
        f"{layers} of {len(layout.records) - 2} | {needed} | {tokens:,.0f} | {rate:.0f} | {found.limit} |"
    )
    return line, found, rate


@pytest.mark.parametrize("case", ONE_GPU, ids=lambda case: "-".join(map(str, case)))
def test_one_gpu_as_documented(case: tuple[Any, ...]) -> None:
    """Published for streaming on one GPU: 272 TFLOP/s on an H100, 284 on a GH200, with the state in host memory."""
    line, found, rate = on_one_gpu(*case)
    assert found.fits
    assert line in (ROOT / "docs" / "weight-streaming.md").read_text(), line
    assert found.device_capacity_bytes is not None
    assert found.needs.total_device_bytes <= found.device_capacity_bytes
    if case[5] == "ram" and case[2] != "32B":
        assert 272 < rate < 0.45 * 989
