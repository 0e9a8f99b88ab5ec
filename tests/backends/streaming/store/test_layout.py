"""The layout: every parameter exactly once, nothing overlaps, and no update ever writes where live data lies."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.backends.streaming.store.layout import GRANULE, PAGE_BYTES, Layout, make_layout
from weftrain.backends.streaming.store.state_format import FORMATS
from weftrain.core.config import Recipe
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe

Tiny = Callable[..., Recipe]


def layouts(recipe: Recipe) -> list[Layout]:
    return [
        make_layout(recipe, name, split_above=above, tile_elements=tile, shard=(world - 1, world))
        for name in FORMATS
        for above, tile, world in ((None, 4096, 1), (4096, 4096, 1), (8192, 20000, 2), (1 << 20, 1 << 20, 3))
    ]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_every_element_lies_in_one_place(family: str, compute: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe(family, "model.num_layers=3", f"precision.compute={compute}")
    for layout in layouts(recipe):
        found: dict[str, list[tuple[int, int]]] = {}
        for tile in layout.tiles:
            end = 0
            for fragment in tile.fragments:
                assert fragment.offset >= end
                end = fragment.offset + fragment.stop - fragment.start
                found.setdefault(fragment.name, []).append((fragment.start, fragment.stop))
            assert end <= tile.elements
            assert tile.elements % (GRANULE * layout.shard[1]) == 0
            assert tile.bytes % PAGE_BYTES == tile.compute_bytes % PAGE_BYTES == tile.compute_offset % PAGE_BYTES == 0
        for spec in parameter_specs(recipe.model):
            ends = [0, *(stop for _, stop in found[spec.name])]
            assert [start for start, _ in found[spec.name]] == ends[:-1]
            assert ends[-1] == spec.size


@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_a_cut_tensor_lies_in_one_piece_in_its_slot(family: str, tiny_recipe: Tiny) -> None:
    layout = make_layout(tiny_recipe(family, "model.hidden_size=96"), "fp32", split_above=4096, tile_elements=4096)
    cut = 0
    for record in layout.records:
        ends: dict[str, int] = {}
        for tile in record.tiles:
            for fragment in tile.fragments:
                first = tile.compute_offset + 4 * fragment.offset
                cut += fragment.start > 0
                assert ends.get(fragment.name, first) == first
                ends[fragment.name] = first + 4 * (fragment.stop - fragment.start)
    assert cut > 3


@given(
    updates=st.integers(0, 40),
    family=st.sampled_from(["crystal", "amber"]),
    shape=st.sampled_from([(None, 4096), (4096, 4096), (None, 10**6)]),
)
@settings(max_examples=40, deadline=None)
def test_no_update_writes_where_live_data_lies(updates: int, family: str, shape: tuple[int | None, int]) -> None:
    recipe = load_recipe(
        f"{family}_demo",
        [
            "model.num_layers=4",
            "model.hidden_size=64",
            "model.num_heads=4",
            "model.vocab_size=97",
            "model.rotary_dim=16",
        ],
    ).recipe
    layout = make_layout(recipe, "split", split_above=shape[0], tile_elements=shape[1])
    live = {tile.index: (layout.offset(tile, updates), tile.bytes) for tile in layout.tiles}
    gradients = [(layout.gradient_offset(tile), tile.gradient_bytes) for tile in layout.tiles]
    for tile in layout.tiles:
        start, size = layout.offset(tile, updates + 1), tile.bytes
        for other, length in (*live.values(), *gradients):
            assert start + size <= other or other + length <= start
        assert start + size <= layout.state_bytes
        live[tile.index] = (start, size)
    assert max(offset + size for offset, size in gradients) == layout.file_bytes


def test_disk_of_the_whole_crystalcoder() -> None:
    """DESIGN's promise: 66 GB with bf16 moments, 53 GB with 8-bit ones, gradients and the spare places included."""
    recipe = load_recipe(
        "crystalcoder_7b_phase1", ["batch.replicas=1", "batch.global_batch_size=1", "batch.micro_batch_size=1"]
    ).recipe
    sizes = {name: make_layout(recipe, name, split_above=1 << 23, tile_elements=1 << 23).file_bytes for name in FORMATS}
    assert sizes["bf16_moments"] <= 66e9
    assert sizes["int8_moments"] <= 53e9
    assert sizes["split"] < sizes["fp32"]


def test_the_identity_names_all_that_matters(tiny_recipe: Tiny) -> None:
    base = make_layout(tiny_recipe(), "fp32", split_above=None, tile_elements=4096)
    others = [
        make_layout(tiny_recipe("crystal", "model.num_layers=3"), "fp32", split_above=None, tile_elements=4096),
        make_layout(tiny_recipe("crystal", "precision.compute=bfloat16"), "fp32", split_above=None, tile_elements=4096),
        make_layout(tiny_recipe("crystal", "batch.micro_batch_size=1"), "fp32", split_above=None, tile_elements=4096),
        make_layout(tiny_recipe(), "split", split_above=None, tile_elements=4096),
        make_layout(tiny_recipe(), "fp32", split_above=8192, tile_elements=4096),
        make_layout(tiny_recipe(), "fp32", split_above=None, tile_elements=8192),
        make_layout(tiny_recipe(), "fp32", split_above=None, tile_elements=4096, shard=(1, 2)),
    ]
    assert len({json.dumps(layout.identity) for layout in (base, *others)}) == 1 + len(others)
