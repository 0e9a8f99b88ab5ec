"""Series for tests of the audit: a clean one whose weights move as those of a training do, and one with a mistake of
each kind that was published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from weftrain.core.formats.tensor_file import pack_header
from weftrain.exchange.huggingface.config import config_from_huggingface
from weftrain.exchange.layouts import foreign_tensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PYTHIA_STEPS = [0, *(2**power for power in range(10)), *range(1000, 144_000, 1000)]  # the 154 of each Pythia
Weights = dict[str, np.ndarray]


def trained(steps: Sequence[int], config: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[int, Weights]:
    """Weights at each step: a start that fades, a direction that grows, and a random walk that slows down."""
    generator = np.random.default_rng(seed)
    shapes = {one.name: one.shape for one in foreign_tensors(config_from_huggingface(config), "llama")}
    start = {name: 0.02 * generator.standard_normal(shape) for name, shape in shapes.items()}
    target = {name: 0.05 * generator.standard_normal(shape) for name, shape in shapes.items()}
    noise = {name: np.zeros(shape) for name, shape in shapes.items()}
    found, before = {}, 0
    for step in steps:
        grown = 1 - math.exp(-step / 20_000)
        scale = 0.002 * math.sqrt((step - before) / 1000)
        for name, shape in shapes.items():
            noise[name] = noise[name] + scale * generator.standard_normal(shape)
        found[step] = {name: start[name] + grown * target[name] + noise[name] for name in shapes}
        before = step
    return found


def file_of(weights: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A safetensors file."""
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    data = b"".join(
        torch.from_numpy(np.ascontiguousarray(value)).to(kind).view(torch.uint8).numpy().tobytes()
        for value in weights.values()
    )
    return pack_header({name: (dtype, value.shape) for name, value in weights.items()}) + data


def revision(weights: Mapping[str, np.ndarray], dtype: str = "F32", **changed: Any) -> dict[str, bytes]:
    return {"config.json": json.dumps({**CONFIG, **changed}).encode(), "model.safetensors": file_of(weights, dtype)}


def clean(steps: Sequence[int] = PYTHIA_STEPS) -> dict[str, dict[str, bytes]]:
    """A branch a step and main, which is the last step."""
    found = {f"step{step}": revision(weights) for step, weights in trained(steps).items()}
    return {**found, "main": dict(found[f"step{steps[-1]}"])}


def planted() -> dict[str, dict[str, bytes]]:
    """154 revisions, in a tenth of which or more each published kind of mistake was made.

    step1000 .. step86000 serve the weights of the end; step90000 = step91000 = step92000; step95000 is missing, and
    step143500 brings the number to 154; step100000 says fewer tokens than step99000; from step110000 on the weights are
    bf16; from step115000 on the config has another rope_theta; the config of step120000 contradicts its embedding; and
    from step135000 on the weights are 1.5 times as large.
    """
    steps = [step for step in PYTHIA_STEPS if step != 95_000] + [143_500]
    found: dict[str, dict[str, bytes]] = {}
    for step, weights in trained(steps).items():
        if step >= 135_000:
            weights = {name: 1.5 * value for name, value in weights.items()}
        bf16 = step >= 110_000
        changed: dict[str, Any] = {"torch_dtype": "bfloat16"} if bf16 else {}
        changed |= {"rope_theta": 500_000.0} if step >= 115_000 else {}
        changed |= {"vocab_size": 50} if step == 120_000 else {}
        tokens = {99_000: "-tokens207B", 100_000: "-tokens20B"}.get(step, "")
        found[f"step{step}{tokens}"] = revision(weights, "BF16" if bf16 else "F32", **changed)
    for step in range(1000, 87_000, 1000):
        found[f"step{step}"]["model.safetensors"] = found["step143500"]["model.safetensors"]
        found[f"step{step}"]["config.json"] = found["step143500"]["config.json"]
    for step in (91_000, 92_000):
        found[f"step{step}"] = dict(found["step90000"])
    return found
