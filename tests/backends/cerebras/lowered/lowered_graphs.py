"""Small steps that the vendor's front end lowered, stored with their recipes, so that most tests need no vendor
environment.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path

from weftrain.backends.cerebras.lowered.graph import Graph
from weftrain.backends.cerebras.lowered.mlir_text import parse_graph
from weftrain.core.config import Recipe

STORED = Path(__file__).with_name("graphs")

# Three kinds of segment in five steps; eps so large that its place matters; clip_norm between the norms of small and of
# large weights.
BASE = (
    "schedule.steps=5",
    "schedule.learning_rate=[{shape: linear, steps: 2, start: 0, end: 0.01}, {shape: cosine, steps: 2, start: 0.01, "
    "end: 0.001}, "
    "{shape: constant, steps: 1000, start: 0.001}]",
    "optimizer.eps=1e-4",
    "kernels.preferences=[reference]",
)
# The vendor rounds attention's scale to bf16: a head of 16 has one that stays.
BFLOAT16 = "precision.compute=bfloat16"
GROUPED = ("model.num_heads=4", "model.num_kv_heads=2", "model.rotary_dim=12")
OF_16 = ("model.head_dim=16", "model.rotary_dim=16")
LLAMA3 = (
    "model.rotary_scaling={kind: llama3, factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
    "original_max_position_embeddings: 24}"
)
CLIP = {"crystal": "optimizer.clip_norm=1.5", "amber": "optimizer.clip_norm=2.0"}
GRAPHS = {
    "crystal_float32": ("crystal", "precision.compute=float32"),
    "crystal_bfloat16": ("crystal", "precision.compute=bfloat16"),
    "amber_float32": ("amber", "precision.compute=float32"),
    "amber_bfloat16": ("amber", "precision.compute=bfloat16"),
    "amber_before_correction": (
        "amber",
        "optimizer.eps_placement=before_bias_correction",
        "optimizer.decay=matrices_and_embeddings",
    ),
    # Each of these differs from crystal_float32 by one key, and is held against it where a difference must be seen.
    "crystal_after_correction": ("crystal", "optimizer.eps_placement=after_bias_correction"),
    "crystal_rotate_half": ("crystal", "model.rotary_interleaved=false"),
    "crystal_rotary_dim_6": ("crystal", "model.rotary_dim=6"),
    "crystal_decay_all": ("crystal", "optimizer.decay=all"),
    # Fields of the open families, several in each. Those in bf16 are held against fp32 too, without their rounding.
    "grouped_heads": ("amber", *GROUPED, LLAMA3),
    "norms_of_heads": ("amber", *GROUPED, *OF_16, "model.qk_norm=per_head", BFLOAT16),
    "kinds_of_layers": (
        "amber",
        *GROUPED,
        "model.num_layers=3",
        "model.qk_norm=full",
        "model.norm_placement=after",
        "model.rotary_scaling={kind: yarn, factor: 4.0, original_max_position_embeddings: 16}",
        "model.layer_pattern=[{window: 5, rotary: unscaled}, {}, {rotary: none}]",
    ),
    "parallel_gelu": (
        "amber",
        "model.norm=layer_norm",
        "model.linear_bias=true",
        "model.rotary_dim=4",
        "model.residual=parallel",
        "model.feed_forward=gelu",
        BFLOAT16,
    ),
    "offset_and_softcap": (
        "amber",
        *GROUPED,
        *OF_16,
        "model.qkv_bias=true",
        "model.tie_embeddings=true",
        "model.norm_weight_offset=1",
        "model.logits_softcap=2.0",
        "model.layer_pattern=[{window: 6}]",
        BFLOAT16,
    ),
}


def recipe_of_graph(name: str, tiny_recipe: Callable[..., Recipe], *changes: str) -> Recipe:
    """The recipe that a stored graph was lowered from, with changes laid over it."""
    family, *overrides = GRAPHS[name]
    return tiny_recipe(family, *BASE, CLIP[family], *overrides, *changes)


def stored_text(name: str) -> str:
    """A stored graph in the generic form, its locations cut to scope and torch op."""
    return gzip.decompress((STORED / f"{name}.mlir.gz").read_bytes()).decode()


@cache
def stored_graph(name: str) -> Graph:
    return parse_graph(stored_text(name), name)
