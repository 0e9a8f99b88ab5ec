"""From stored planes to the fp32 weights and moments that AdamW updates, and back. All tensors are flat, one tile or a
part of one.

`low` is not the low half of the fp32 weight: it is that half plus 0x8000 (mod 2^16), and `high` is the upper half after
the same addition. So `high` is the weight rounded to nearest, ties away from zero, and both restore every bit pattern.
(Ties to even could not be undone from 16 bits: both neighbours of an even number round to it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.backends.streaming.store.layout import Tile
from weftrain.backends.streaming.store.state_format import ITEM_BYTES, MOMENT_BLOCK

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
Planes = dict[str, Tensor]
_HALF = 0x8000


def planes_in(memory: Tensor, tile: Tile) -> Planes:
    """A tile's planes as views of its bytes, uint8 [tile.bytes]."""
    return {
        name: memory[offset : offset + plane.bytes(len(tile.owned))].view(DTYPES[plane.dtype])
        for name, (offset, plane) in tile.plane_offsets().items()
    }


def planes_apart(tile: Tile, first: Tensor | None, rest: Tensor | None) -> Planes:
    """The same where the first plane lies apart: views of its bytes, and of those of the other planes."""
    found = {} if first is None else {tile.planes[0].name: first.view(DTYPES[tile.planes[0].dtype])}
    for name, (offset, plane) in list(tile.plane_offsets().items())[1:] if rest is not None else []:
        assert rest is not None
        at = offset - tile.compute_bytes
        found[name] = rest[at : at + plane.bytes(len(tile.owned))].view(DTYPES[plane.dtype])
    return found


class UpdateBuffers:
    """fp32 buffers for a tile's update, reused for the next tile; planes that are fp32 are updated in place."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def load(self, planes: Planes, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, exp_avg and exp_avg_sq of a part of a tile (in multiples of MOMENT_BLOCK), fp32."""
        weights = self.load_weights(planes, part)
        moments = []
        for name in ("exp_avg", "exp_avg_sq"):
            if name in planes and planes[name].dtype == torch.float32:
                moments.append(planes[name][part])
            elif "exp_avg_root" not in planes:
                moments.append(self._buffer(name, planes, part).copy_(planes[name][part]))
            else:
                moments.append(_widened(planes, name, part, self._buffer(name, planes, part)))
        return weights, moments[0], moments[1]

    def load_weights(self, planes: Planes, part: slice) -> Tensor:
        """The same, of the weights alone: a frozen tile has nothing else."""
        if "weights" in planes:
            return planes["weights"][part]
        return join(planes["high"][part], planes["low"][part], self._buffer("weights", planes, part))

    def save(self, planes: Planes, part: slice, weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Write back what `load` copied; the bf16 copy of fp32 weights is written by AdamW itself."""
        if "weights" not in planes:
            split(weights, planes["high"][part], planes["low"][part])
        for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if "exp_avg_root" in planes:
                _narrow(planes, name, part, moment)
            elif planes[name].dtype != torch.float32:
                planes[name][part].copy_(moment)

    def _buffer(self, name: str, planes: Planes, part: slice) -> Tensor:
        size, device = part.stop - part.start, next(iter(planes.values())).device
        key = name, device
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=torch.float32, device=device)
        return self._buffers[key][:size]


def join(high: Tensor, low: Tensor, out: Tensor) -> Tensor:
    """fp32 [n] from high bf16 [n] and low int16 [n]."""
    halves = out.view(torch.int16).view(-1, 2)  # little-endian: the low half first
    halves[:, 0].copy_(low)
    halves[:, 1].copy_(high.view(torch.int16))
    out.view(torch.int32).sub_(_HALF)
    return out


def split(weights: Tensor, high: Tensor, low: Tensor) -> None:
    """high bf16 [n] and low int16 [n] from fp32 [n], which is overwritten."""
    weights.view(torch.int32).add_(_HALF)
    halves = weights.view(torch.int16).view(-1, 2)
    low.copy_(halves[:, 0])
    high.view(torch.int16).copy_(halves[:, 1])


def _widened(planes: Planes, name: str, part: slice, out: Tensor) -> Tensor:
    stored = "exp_avg" if name == "exp_avg" else "exp_avg_root"
    scale = planes[f"{stored}_scale"][part.start // MOMENT_BLOCK : part.stop // MOMENT_BLOCK]
    out.copy_(planes[stored][part]).view(-1, MOMENT_BLOCK).mul_(scale[:, None])
    return out if name == "exp_avg" else out.square_()


def _narrow(planes: Planes, name: str, part: slice, moment: Tensor) -> None:
    """Linear in each block of 256; the root is rounded up, so that no second moment becomes 0 before the first does."""
    stored, most = ("exp_avg", 127.0) if name == "exp_avg" else ("exp_avg_root", 255.0)
    values = (moment if name == "exp_avg" else moment.sqrt_()).view(-1, MOMENT_BLOCK)
    scale = planes[f"{stored}_scale"][part.start // MOMENT_BLOCK : part.stop // MOMENT_BLOCK]
    torch.amax(values.abs(), 1, out=scale).div_(most)
    values.div_(scale[:, None].clamp_min(torch.finfo(torch.float32).tiny))
    rounded = values.round_() if name == "exp_avg" else values.ceil_()
    planes[stored][part].view(-1, MOMENT_BLOCK).copy_(rounded.clamp_(-most, most))
