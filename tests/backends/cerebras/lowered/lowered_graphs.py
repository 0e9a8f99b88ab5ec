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
}


def recipe_of_graph(name: str, tiny_recipe: Callable[..., Recipe]) -> Recipe:
    """The recipe that a stored graph was lowered from."""
    family, *overrides = GRAPHS[name]
    return tiny_recipe(family, *BASE, CLIP[family], *overrides)


def stored_text(name: str) -> str:
    """A stored graph in the generic form, its locations cut to scope and torch op."""
    return gzip.decompress((STORED / f"{name}.mlir.gz").read_bytes()).decode()


@cache
def stored_graph(name: str) -> Graph:
    return parse_graph(stored_text(name), name)
