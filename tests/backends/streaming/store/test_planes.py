"""State formats: what is exact is exact for every bit pattern, and what is rounded is rounded as stated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.backends.streaming.store.planes import DTYPES, UpdateBuffers, join, split
from weftrain.backends.streaming.store.state_format import FORMATS, MOMENT_BLOCK


def through(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high, low = torch.empty(weights.numel(), dtype=torch.bfloat16), torch.empty(weights.numel(), dtype=torch.int16)
    split(weights.clone(), high, low)
    return high, join(high, low, torch.empty(weights.numel()))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
@settings(max_examples=200, deadline=None)
def test_split_and_join_restore_every_pattern(patterns: list[int]) -> None:
    bits = torch.tensor(patterns, dtype=torch.int32)
    assert torch.equal(through(bits.view(torch.float32))[1].view(torch.int32), bits)


def test_the_high_plane_is_the_rounded_weight() -> None:
    """Nearest for every low half; at exactly half away from zero, where torch's cast takes the even one."""
    low = torch.arange(65536, dtype=torch.int64)
    for upper in (0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x0001, 0x4000):
        bits = (upper << 16 | low).where(torch.tensor(upper < 0x8000), (upper << 16 | low) - 2**32).to(torch.int32)
        weights = bits.view(torch.float32)
        high, _ = through(weights)
        tie = low == 0x8000
        assert torch.equal(high[~tie], weights[~tie].bfloat16())
        assert (high[tie].float().abs() > weights[tie].abs()).all()


def planes_of(name: str, elements: int) -> dict[str, torch.Tensor]:
    return {
        p.name: torch.zeros(elements // p.elements_per_item, dtype=DTYPES[p.dtype])
        for p in FORMATS[name].planes("bfloat16")
    }


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_save_then_load(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    elements = 4 * MOMENT_BLOCK
    weights, exp_avg = (torch.randn(elements, generator=generator) for _ in range(2))
    exp_avg_sq = torch.randn(elements, generator=generator).square() * 10.0 ** torch.randint(
        -6, 3, (elements,), generator=generator
    )
    planes, work, part = planes_of(name, elements), UpdateBuffers(), slice(0, elements)
    if "weights" in planes:
        planes["weights"].copy_(weights)
    for plane, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if plane in planes and planes[plane].dtype == torch.float32:
            planes[plane].copy_(value)
    work.save(planes, part, weights.clone(), exp_avg.clone(), exp_avg_sq.clone())
    found = [tensor.clone() for tensor in work.load(planes, part)]
    assert torch.equal(found[0], weights)
    if name in ("fp32", "split"):
        assert torch.equal(found[1], exp_avg)
        assert torch.equal(found[2], exp_avg_sq)
    elif name == "bf16_moments":
        assert torch.equal(found[1], exp_avg.bfloat16().float())
        assert torch.equal(found[2], exp_avg_sq.bfloat16().float())
    else:
        block = exp_avg.view(-1, MOMENT_BLOCK).abs().amax(1, keepdim=True)
        assert ((found[1] - exp_avg).view(-1, MOMENT_BLOCK).abs() <= block / 127 * 0.5001).all()
        root = exp_avg_sq.sqrt().view(-1, MOMENT_BLOCK)
        step = root.amax(1, keepdim=True) / 255
        up = found[2].sqrt().view(-1, MOMENT_BLOCK) - root
        assert (up >= -1e-5 * root.amax()).all(), "never rounded down: no second moment may vanish"
        assert (up <= step * 1.0001).all()
        assert (found[2] > 0).all()


def test_parts_of_a_tile_are_the_tile() -> None:
    """The mapped store updates a tile part by part."""
    elements = 8 * MOMENT_BLOCK
    generator = torch.Generator().manual_seed(5)
    values = [torch.rand(elements, generator=generator) for _ in range(3)]
    whole, parts = planes_of("int8_moments", elements), planes_of("int8_moments", elements)
    UpdateBuffers().save(whole, slice(0, elements), *(value.clone() for value in values))
    for start in range(0, elements, 2 * MOMENT_BLOCK):
        part = slice(start, start + 2 * MOMENT_BLOCK)
        UpdateBuffers().save(parts, part, *(value[part].clone() for value in values))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_zero_moments_stay_zero() -> None:
    planes, part = planes_of("int8_moments", MOMENT_BLOCK), slice(0, MOMENT_BLOCK)
    UpdateBuffers().save(planes, part, *(torch.zeros(MOMENT_BLOCK) for _ in range(3)))
    assert all(not tensor.any() for tensor in UpdateBuffers().load(planes, part))
