"""What a rank needs, sends and takes: by hand, against published runs, and refused with what would fit."""

from __future__ import annotations

import dataclasses
import re

import psutil
import pytest
import torch

from weftrain.analysis.machine.devices import DEVICES, DeviceError, parse_devices, speeds
from weftrain.backends.common.device_memory import activations, largest_micro_batch
from weftrain.backends.cuda import BACKEND
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import gathered_blocks, needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.planner import check_memory, predict, traffic
from weftrain.backends.cuda.stage_share import shares_of
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.recipe_file import load_recipe

AMBER_BLOCKS, AMBER_OUTER, AMBER_NORMS = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096, 65 * 4096


def amber(*overrides: str) -> Recipe:
    return load_recipe("amber_7b", list(overrides), "cuda").recipe


def options(**changes: object) -> CudaOptions:
    return CudaOptions.model_validate({"activation_checkpointing": "full", **changes})


def test_memory_by_hand() -> None:
    """Amber, 224 ranks: fp32 weights and two moments of 1/224 of all but the norms; while the last but one block is
    differentiated, two blocks and the outer ones in bf16, the head's gradient and that of the last block in fp32.
    """
    found = needs(amber(), options(), Degrees(1, 224, 1, 1), "cuda").memory_bytes
    owned = AMBER_BLOCKS // 224 + AMBER_OUTER // 224 + AMBER_NORMS
    assert (found["weights, fp32"], found["optimizer"], found["gradients"]) == (4 * owned, 8 * owned, 4 * (owned // 32))
    assert found["gathered weights"] == 2 * (2 * AMBER_BLOCKS // 32 + AMBER_OUTER)
    assert found["whole gradients"] == 2 * 32000 * 4096 + 4 * AMBER_BLOCKS // 32 + 2 * 4096 * 11008
    assert found["activations"] == 10 * 2048 * 4 * 4096 * 32  # the stream before each block


def test_sixteen_bytes_a_parameter_on_one_device_with_accumulation() -> None:
    """Weights, two moments and one set of fp32 gradients, sharded or not yet; beside them what a block at work has."""
    recipe = amber("batch.replicas=1", "batch.global_batch_size=8", "batch.micro_batch_size=4")
    found = needs(recipe, options(), Degrees(1, 1, 1, 1), "cuda").memory_bytes
    everything, two_blocks = AMBER_BLOCKS + AMBER_OUTER + AMBER_NORMS, 2 * AMBER_BLOCKS // 32 + AMBER_OUTER
    held = sum(found[name] for name in ("weights, fp32", "optimizer", "gradients", "whole gradients"))
    beside = 2 * 4096 * 11008  # the first new gradient; one device sends none
    assert held == pytest.approx(16 * everything + beside, rel=0.001)
    assert found["gathered weights"] == 2 * two_blocks


def test_tensor_ranks_with_linear_maps_in_parts_by_hand() -> None:
    """Blocks are divided between them; embedding, head and the stream between the blocks are not."""
    in_parts = "precision={compute: bfloat16, numerics: replayable, tensor_parts: 4}"
    recipe, chosen = amber(in_parts, "batch.replicas=112"), options(tensor_parallel=2)
    shape = Degrees(1, 112, 1, 2, copies=2)
    found, sent = needs(recipe, chosen, shape, "cuda").memory_bytes, traffic(recipe, chosen, shape)
    assert found["weights, fp32"] == 4 * (AMBER_BLOCKS // 224 + AMBER_OUTER // 112 + AMBER_NORMS)
    assert found["activations"] == 10 * 2048 * 4 * 4096 * 33  # of all tokens, the stream before each block and the head
    tokens = recipe.tokens_per_step // 112
    # fp32 sums of two branches, to one other rank: forward, again in backward, and backward
    assert sent["tokens between tensor ranks"] == 3 * 2 * 4 * tokens * 4096 * 32


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


def test_experts_on_eight_ranks_by_hand() -> None:
    """OLMoE, 8 of 64 experts of 3 x 1024 x 2048: divided between 8 ranks none of them is gathered, and rows are sent."""
    batch = ["batch.replicas=8", "batch.global_batch_size=64", "batch.micro_batch_size=4"]
    recipe = load_recipe("olmoe_1b_7b", batch, "cuda").recipe
    layers, hidden = recipe.model.num_layers, recipe.model.hidden_size
    experts = layers * 64 * 3 * 1024 * hidden
    one, eight = (options(expert_parallel=ranks) for ranks in (1, 8))
    together, divided = Degrees(1, 8, 1, 1), Degrees(1, 8, 1, 1, expert=8)
    before, after = traffic(recipe, one, together), traffic(recipe, eight, divided)
    micro = recipe.batch.accumulation_steps
    assert before["gather weights"] - after["gather weights"] == 2 * micro * 2 * experts * 7 // 8
    assert before["scatter gradients"] - after["scatter gradients"] == 4 * experts * 7 // 8
    rows = micro * 4 * recipe.data.sequence_length * 8 * layers
    # there and back, in forward, in its recomputation and in backward
    assert after["tokens to experts"] == 3 * 2 * 2 * rows * hidden * 7 // 8
    here, there = (needs(recipe, *asked, "cuda").memory_bytes for asked in ((one, together), (eight, divided)))
    assert (here["weights, fp32"], here["optimizer"]) == (there["weights, fp32"], there["optimizer"])
    assert here["gathered weights"] - there["gathered weights"] == 2 * 2 * experts * 7 // 8 // layers


def test_experts_and_tensor_parallelism_on_eight_ranks_by_hand() -> None:
    """OLMoE with a shared expert: tensor ranks cut attention alone. They have tokens of their own for the experts, which
    are divided between all of them and not cut.
    """
    batch = ["batch.replicas=4", "batch.global_batch_size=64", "batch.micro_batch_size=4", "model.experts.shared=1"]
    recipe = load_recipe("olmoe_1b_7b", batch, "cuda").recipe
    layers, hidden, micro = recipe.model.num_layers, recipe.model.hidden_size, recipe.batch.accumulation_steps
    attention, each = layers * 4 * hidden**2, layers * 3 * 1024 * hidden
    asked, shape = options(tensor_parallel=2, expert_parallel=8), Degrees(1, 4, 1, 2, expert=8)
    assert gathered_blocks(recipe, shape, *shares_of(recipe, asked)) == (64 * each // 8, each, attention // 2)
    found = traffic(recipe, asked, shape)
    outer = 2 * recipe.model.vocab_size * hidden
    whole = 2 * (each * 7 / 8 + attention / 2 * 3 / 4) + outer * 7 / 8  # blocks in forward and again in backward
    assert found["gather weights"] == int(2 * micro * whole)
    tokens = micro * 4 * recipe.data.sequence_length * layers
    assert found["tokens between tensor ranks"] == 3 * 2 * 2 * tokens * hidden // 2
    assert found["tokens to experts"] == 3 * 2 * 2 * 8 * tokens // 2 * hidden * 7 // 8
    here, there = (
        needs(recipe, *one, "cuda").memory_bytes for one in ((asked, shape), (options(), Degrees(1, 8, 1, 1)))
    )
    assert (here["weights, fp32"], here["optimizer"]) == (there["weights, fp32"], there["optimizer"])
    # a block's weights are gathered twice at the worst moment: an eighth of its experts, and half of its attention
    saved = 64 * each * 7 // 8 + attention // 2
    assert there["gathered weights"] - here["gathered weights"] == 2 * 2 * saved // layers


# name -> layers, elements of a layer's matrices, of embedding and head, of norms; kv heads' and inner features
BY_HAND = {
    "llama31_8b": (32, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336, 2 * 128256 * 4096, 65 * 4096, 14336),
    "qwen3_8b": (36, 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288, 2 * 151936 * 4096, 73 * 4096 + 72 * 128, 12288),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_family_on_eight_devices_of_80_gb_by_hand(name: str) -> None:
    """32 query and 8 key heads of 128: k and v are a quarter of q. Eight sequences of 4096, sharded over 8 devices."""
    layers, a_layer, outer, norms, inner = BY_HAND[name]
    batch = ["batch.replicas=8", "batch.micro_batch_size=1", "batch.global_batch_size=8", "data.sequence_length=4096"]
    recipe = load_recipe(name, batch, "cuda").recipe
    chosen, shape = options(activation_checkpointing="selective"), Degrees(1, 8, 1, 1)
    found = predict(recipe, chosen, shape, speeds(8, DEVICES["H100"]))
    owned = layers * a_layer // 8 + outer // 8 + norms
    held, sent = found.needs.memory_bytes, found.sent_bytes
    assert (held["weights, fp32"], held["optimizer"]) == (4 * owned, 8 * owned)
    # a token's stream in fp32; q, k, v, attention's result, o, gate, up and down in bf16
    kept = 4 * 4096 + 2 * (4 * 4096 + 2 * 1024 + 2 * inner)
    assert activations(recipe.model, 2, "selective", False).kept == kept
    assert held["rotary tables"] == recipe.model.max_position_embeddings * 64 * 2 * 4
    assert sent["gather weights"] == int(2 * 2 * layers * a_layer * 7 / 8 + 2 * outer * 7 / 8)
    peak = 989.4e12
    products = 6 * (layers * a_layer + outer / 2) * 4096
    assert found.parts["matrix products"] == pytest.approx(products / (peak * 0.5))
    attention = 12 * 32 * 128 * 2048 * layers * 4096  # a query sees half of the row
    assert found.parts["attention"] == pytest.approx(attention / (peak * 0.3))
    assert found.needs.total_memory_bytes < 80e9


def parts(name: str, shape: Degrees, *overrides: str, **changes: object) -> tuple[dict[str, int], dict[str, int]]:
    recipe, chosen = load_recipe(name, list(overrides), "cuda").recipe, options(**changes)
    return needs(recipe, chosen, shape, "cuda").memory_bytes, traffic(recipe, chosen, shape)


def test_heads_of_another_size_by_hand() -> None:
    """Qwen3-0.6B: 16 query and 8 key heads of 128 on a width of 1024, so q is twice as wide as a token."""
    size = ["batch.micro_batch_size=1", "data.sequence_length=1024", "model.max_position_embeddings=1024"]
    one = Degrees(1, 1, 1, 1)
    held, _ = parts("qwen3_0_6b", one, *size, activation_checkpointing="selective")
    a_token = 4 * 1024 + 2 * (2 * 2048 + 2 * 1024 + 2 * 1024 + 2 * 3072)
    assert held["activations"] == 1024 * (28 * a_token + 4 * 1024)
    kept, _ = parts("qwen3_0_6b", one, *size, activation_checkpointing="none")
    normed = 2048 + 1024
    a_token = 8 * 1024 + 2 * (2 * 1024 + 2 * 2048 + 2 * 1024 + normed + 3 * 3072)
    assert kept["activations"] == 1024 * (28 * a_token + 4 * 1024)


def test_heads_that_ranks_share_by_hand() -> None:
    """8 key heads over 16 ranks: each counts twice, in memory and between the ranks that share it."""
    size = ["batch.micro_batch_size=1", "batch.replicas=1", "batch.global_batch_size=1", "data.sequence_length=4096"]
    selective = {"activation_checkpointing": "selective"}
    _, sent = parts("llama31_8b", Degrees(1, 1, 1, 16), *size, tensor_parallel=16, **selective)
    a_token = 4 * 4096 + 2 * (4 * 4096 + 2 * 16 * 128 + 2 * 14336)
    model = load_recipe("llama31_8b", size, "cuda").recipe.model
    assert activations(model, 2, "selective", False, 16, 16).kept == a_token
    hidden, head = 2 * 4096 * 32 * 4096, 2 * 4096 * 32 * 128
    assert sent["tokens between tensor ranks"] == int(3 * (4 * hidden * 15 / 16 + 2 * head * 1 / 2))
    _, sent = parts("llama31_8b", Degrees(1, 1, 16, 1), *size, context_parallel=16, **selective)
    assert sent["heads between context ranks"] == int(3 * 2 * 256 * 32 * (2 * 4096 + 2 * 16 * 128) * 15 / 16)


def test_windows_and_gelu_by_hand() -> None:
    """OLMo 3: three of four layers see 4096 keys at most. Pythia: two matrices and no gate."""
    on = speeds(1, DEVICES["H100"])
    one, size = Degrees(1, 1, 1, 1), ["batch.micro_batch_size=1", "batch.replicas=1", "batch.global_batch_size=1"]
    olmo = load_recipe("olmo3_7b", [*size, "data.sequence_length=8192"], "cuda").recipe
    seen = 24 * (4096 - 4096 * 4096 / (2 * 8192)) + 8 * 4096  # the first 4096 queries see fewer
    found = predict(olmo, options(activation_checkpointing="none"), one, on)
    assert found.parts["attention"] == pytest.approx(12 * 4096 * seen * 8192 / (989.4e12 * 0.3))
    pythia = load_recipe("pythia_6_9b", [], "cuda").recipe.model
    assert activations(pythia, 2, "selective", False).kept == 4 * 4096 + 2 * (6 * 4096 + 16384)


LONG = ["data.sequence_length=4096", "model.max_position_embeddings=4096", "batch.micro_batch_size=2"]
HSDP = {"parallel": "hsdp", "shard_group": 8, "reduce": "bfloat16", "activation_checkpointing": "none"}
LLAMA = [
    "data.sequence_length=8192",
    "model.max_position_embeddings=8192",
    "batch.micro_batch_size=1",
    "model.vocab_size=128256",
]
LLAMA += ["model.num_kv_heads=8", "model.intermediate_size=14336", "batch.global_batch_size=8", "batch.replicas=8"]
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

    def needed(changed: Recipe) -> int:
        return needs(changed, options(), shape, "cuda").total_memory_bytes

    def total(micro: int) -> int:
        return needed(recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_batch_size": micro})}))

    most = largest_micro_batch(recipe, needed, capacity)
    assert total(most) <= capacity < total(most + 1)
    assert largest_micro_batch(recipe, needed, 1e9) == 0


@pytest.mark.parametrize("capacity", [100, 115, 125, 145, 175, 1e4, 1e5])
def test_the_largest_micro_batch_may_be_one_that_need_not_accumulate(capacity: float) -> None:
    recipe = amber("batch.replicas=1", "batch.global_batch_size=8", "batch.micro_batch_size=1")

    def needed(changed: Recipe) -> int:
        return 10 * changed.batch.micro_batch_size + 100 * (changed.batch.micro_batch_size < 8)

    most = max((micro for micro in range(1, 4097) if 10 * micro + 100 * (micro < 8) <= capacity), default=0)
    assert largest_micro_batch(recipe, needed, capacity) == (most if capacity >= 110 else 0)  # its own must fit


def test_the_largest_micro_batch_is_not_below_one_that_fits() -> None:
    """A smaller one accumulates gradients, and can need more."""
    recipe, machine = load_recipe("k2_v2_70b", [], "cuda").recipe, speeds(3200, DEVICES["H100"])
    found = BACKEND.predict(recipe, options(**recipe.backend.options), machine)
    assert found.fits
    assert found.largest_micro_batch >= recipe.batch.micro_batch_size


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
