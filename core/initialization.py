"""Initial weights: each parameter drawn alone, from the recipe's seed and its own name."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs

_DRAWN_AT_ONCE = 1 << 20  # elements of a thread's share
_PASS = 1 << 15  # elements of which torch makes a pass in the thread that calls it


def draw(spec: ParameterSpec, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU: a pure function of (spec, config, seed).

    The key of a counter-based generator (Philox) is a hash of seed and name, so a layer can be drawn alone, in any
    order, in any process. Normal by inversion; `truncated_normal` stops at two standard deviations. An adapter's A is
    uniform in +- 1 / sqrt(in), Kaiming's rule (arXiv 1502.01852) with a = sqrt(5), as peft draws it; its B is 0.
    """
    if spec.role is Role.NORM_WEIGHT:
        return torch.full(spec.shape, 1.0 - config.norm_weight_offset)
    if spec.role in (Role.NORM_BIAS, Role.BIAS, Role.LORA_B, Role.ROUTER_BIAS):
        return torch.zeros(spec.shape)
    key = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    if spec.role is Role.LORA_A:
        return _uniform(spec.shape, int.from_bytes(key[:16], "little"), 1 / math.sqrt(spec.shape[1]))
    scales = resolve_scales(config)
    std = {
        Role.EMBEDDING: scales.embedding_std,
        Role.HEAD: scales.head_std,
        Role.MATRIX: scales.matrix_std,
        Role.ROUTER: scales.matrix_std,
        Role.OUTPUT_MATRIX: scales.output_matrix_std,
    }[spec.role]
    stretch = math.erf(math.sqrt(2)) if scales.distribution == "truncated_normal" else 1.0
    found = torch.from_numpy(np.empty(spec.shape, np.float32))  # on the host, whatever torch's default device is
    fill = partial(_fill_normal, found.view(-1), int.from_bytes(key[:16], "little"), stretch, std * math.sqrt(2))
    if found.numel() <= _DRAWN_AT_ONCE:
        fill(0)
        return found
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy and torch release the interpreter's lock
        list(threads.map(fill, range(0, found.numel(), _DRAWN_AT_ONCE)))
    return found


def _uniform(shape: tuple[int, ...], key: int, bound: float) -> Tensor:
    """fp32, odd multiples of bound x 2^-24 in (-bound, bound)."""
    found = torch.from_numpy(np.empty(shape, np.float32))
    np.random.Generator(np.random.Philox(key=key)).random(out=found.view(-1).numpy(), dtype=np.float32)
    return found.mul_(2).add_(2**-24 - 1).mul_(bound)


def _fill_normal(flat: Tensor, key: int, stretch: float, scale: float, first: int) -> None:
    """Elements first..first+_DRAWN_AT_ONCE-1 of a parameter: the same whatever their share. The counter counts 8 of
    them. stretch: of the uniform numbers in (-1, 1), the probability of what is not cut off.
    """
    part = flat[first : first + _DRAWN_AT_ONCE]
    bits = np.random.Philox(key=key)
    np.random.Generator(bits.advance(first // 8)).random(out=part.numpy(), dtype=np.float32)
    for x in part.split(_PASS):
        x.mul_(2).add_(2**-24 - 1)  # multiples of 2^-24 in [0, 1) become odd ones, symmetric about 0: exact
        if stretch != 1.0:
            x.mul_(stretch)
        x.erfinv_().mul_(scale)


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter of a Decoder, or of one of its segments, in place, into whatever device and dtype it has."""
    specs = {spec.name: spec for spec in parameter_specs(config)}
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(specs[f"{module.prefix}{name}"], config, seed))
