"""What a rank needs, sends and takes: by hand, against published runs, and refused with what would fit."""

from __future__ import annotations

import dataclasses
import re

import psutil
import pytest
import torch

from weftrain.analysis.machine.devices import DEVICES, DeviceError, parse_devices, speeds
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import Degrees
from weftrain.backends.cuda.planner import check_memory, largest_micro_batch, needs, predict, traffic
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.recipe_file import load_recipe

AMBER_BLOCKS, AMBER_OUTER, AMBER_NORMS = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096, 65 * 4096


def amber(*overrides: str) -> Recipe:
    return load_recipe("amber_7b", list(overrides), "cuda").recipe


def options(**changes: object) -> CudaOptions:
    return CudaOptions.model_validate({"activation_checkpointing": "full", **changes})


def test_memory_by_hand() -> None:
    """Amber, 224 ranks: fp32 weights, two moments and a gradient of 1/224 of all but the norms; two blocks and the
    outer ones in bf16.
    """
    found = needs(amber(), options(), Degrees(1, 224, 1, 1), "cuda").memory_bytes
    owned = AMBER_BLOCKS // 224 + AMBER_OUTER // 224 + AMBER_NORMS
    assert (found["weights, fp32"], found["optimizer"], found["gradients"]) == (4 * owned, 8 * owned, 4 * owned)
    assert found["gathered weights"] == 2 * (2 * AMBER_BLOCKS // 32 + AMBER_OUTER)
    assert found["activations"] == 10 * 2048 * 4 * 4096 * 32


def test_traffic_by_hand() -> None:
    found = traffic(amber(), options(), Degrees(1, 224, 1, 1))
    share = 223 / 224
    assert found["gather weights"] == int(2 * 2 * AMBER_BLOCKS * share + 2 * AMBER_OUTER * share)
    assert found["scatter gradients"] == int(
        4 * AMBER_BLOCKS * share + 4 * AMBER_OUTER * share + 2 * 4 * AMBER_NORMS * share
    )
    ddp = traffic(amber(), options(parallel="ddp"), Degrees(224, 1, 1, 1))
    assert ddp == {"sum gradients": int(2 * share * (4 * (AMBER_BLOCKS + AMBER_OUTER) + 4 * AMBER_NORMS))}
    assert "tokens between tensor ranks" in traffic(amber(), options(tensor_parallel=2), Degrees(1, 112, 1, 2))
    assert "heads between context ranks" in traffic(amber(), options(context_parallel=2), Degrees(1, 112, 2, 1))
    assert traffic(amber(), options(), Degrees(1, 1, 1, 1)) == {"gather weights": 0, "scatter gradients": 0}


LONG = ["data.sequence_length=4096", "model.max_position_embeddings=4096", "batch.micro_batch_size=2"]
HSDP = {"parallel": "hsdp", "shard_group": 8, "reduce": "bfloat16", "activation_checkpointing": "none"}
# Llama 3 8B has 8 key-value heads, this decoder as many as queries: a narrower FFN gives the same number of parameters.
LLAMA = [
    "data.sequence_length=8192",
    "model.max_position_embeddings=8192",
    "batch.micro_batch_size=1",
    "model.vocab_size=128256",
]
LLAMA += ["model.intermediate_size=12288", "batch.global_batch_size=8", "batch.replicas=8"]
# name, recipe, options, devices, a node's, tokens/s/device as published
PUBLISHED = [
    ("Amber, 224 A100, 4 a node, recomputing", [], {}, 224, "A100-80GB", 4, 2600),
    (
        "fms-fsdp 7B, 128 A100",
        [*LONG, "batch.global_batch_size=256", "batch.replicas=128"],
        HSDP,
        128,
        "A100-80GB",
        8,
        3760,
    ),
    (
        "fms-fsdp 7B, 96 H100, compiled",
        [*LONG, "batch.global_batch_size=192", "batch.replicas=96"],
        {**HSDP, "compile": True},
        96,
        "H100",
        8,
        9600,
    ),
    ("torchtitan 8B, 8 H100, eager", LLAMA, {"activation_checkpointing": "selective"}, 8, "H100", 8, 5762),
    (
        "torchtitan 8B, 8 H100, compiled",
        LLAMA,
        {"activation_checkpointing": "selective", "compile": True},
        8,
        "H100",
        8,
        6667,
    ),
]


@pytest.mark.parametrize(
    ("name", "overrides", "changes", "count", "device", "per_node", "published"),
    PUBLISHED,
    ids=[row[0] for row in PUBLISHED],
)
def test_against_published_runs(
    name: str, overrides: list[str], changes: dict[str, object], count: int, device: str, per_node: int, published: int
) -> None:
    """A prediction is an upper bound of what a tuned run reaches: it was at most a third above, and never a tenth
    below.
    """
    recipe = amber(*overrides)
    chosen = options(**changes)
    shape = Degrees(count // 8, 8, 1, 1) if chosen.parallel == "hsdp" else Degrees(1, count, 1, 1)
    found = predict(recipe, chosen, shape, speeds(count, DEVICES[device], per_node))
    rate = recipe.tokens_per_step / found.step_s / count
    print(f"{name}: predicted {rate:,.0f} tokens/s/device, published {published:,}: {rate / published - 1:+.0%}")
    assert -0.10 < rate / published - 1 < 0.35


def test_what_changes_a_prediction() -> None:
    base = predict(amber(), options(), Degrees(1, 224, 1, 1), speeds(224, DEVICES["A100-80GB"]))
    assert base.limit == "matrix products"
    slow = dataclasses.replace(speeds(224, DEVICES["A100-80GB"]), link_bandwidth=1e9)
    assert predict(amber(), options(), Degrees(1, 224, 1, 1), slow).limit == "communication"
    keeps = predict(
        amber(), options(activation_checkpointing="none"), Degrees(1, 224, 1, 1), speeds(224, DEVICES["A100-80GB"])
    )
    assert keeps.step_s < base.step_s


def test_the_largest_micro_batch_is_the_largest() -> None:
    recipe, shape, capacity = amber(), Degrees(1, 224, 1, 1), 80e9
    most = largest_micro_batch(recipe, options(), shape, capacity)

    def total(micro: int) -> int:
        batch = recipe.batch.model_copy(update={"micro_batch_size": micro})
        return needs(recipe.model_copy(update={"batch": batch}), options(), shape, "cuda").total_memory_bytes

    assert total(most) <= capacity < total(most + 1)
    assert largest_micro_batch(recipe, options(), shape, 1e9) == 0


def test_too_little_memory_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(
        "bench_70m", ["batch.replicas=2", "batch.micro_batch_size=64", "batch.global_batch_size=128"]
    ).recipe
    chosen, shape = CudaOptions(parallel="ddp"), Degrees(2, 1, 1, 1)
    wanted = needs(recipe, chosen, shape, "cpu").total_memory_bytes
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=wanted // 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(BackendError, match=r"what would fit: .*batch\.micro_batch_size=\d+") as caught:
        check_memory(recipe, chosen, shape, torch.device("cpu"))
    micro = int(re.findall(r"micro_batch_size=(\d+)", str(caught.value))[0])
    fits = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_batch_size": micro})})
    check_memory(fits, CudaOptions(parallel="ddp", activation_checkpointing="full"), shape, torch.device("cpu"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=wanted))
    check_memory(recipe, chosen, shape, torch.device("cpu"))


def test_devices() -> None:
    assert parse_devices("224xa100-80gb") == (224, DEVICES["A100-80GB"])
    assert parse_devices("H200")[0] == 1
    for wrong in ("0xH100", "8xH1000", "x"):
        with pytest.raises(DeviceError, match="the names are A100-80GB"):
            parse_devices(wrong)
    with pytest.raises(DeviceError, match="CS-2: no step can be predicted"):
        speeds(16, DEVICES["CS-2"])
    assert all(device.source and device.memory_bytes for device in DEVICES.values())
