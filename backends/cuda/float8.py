"""Linear maps in eight bits, through torchao: which ones, scaled how, and with what a rank gathers of their weights.

`backend.options.float8` is data, and nothing of torchao is imported until a model is built. On a device without such
arithmetic a run is refused; on the CPU torchao's own emulation computes (values rounded to eight bits, products in the
compute dtype), which is slow and for tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weftrain.backends.common.collectives import all_gather
from weftrain.backends.cuda.options import Float8, Scaling
from weftrain.core.errors import BackendError
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs
from weftrain.core.tuning import matched


class _Needs(NamedTuple):
    """What a way of scaling asks for."""

    multiple: int  # that both sizes of a matrix, and of mxfp8 the tokens of a micro-batch, are of
    capability: tuple[int, int]  # of the device
    torchao: str


# Tensor-wise products came with compute capability 8.9, PyTorch's row-wise ones with 9.0 (on 8.9 in later releases
# only), those of blocks of 32 with a scale of a power of two (OCP Microscaling Formats 1.0) with 10.0.
NEEDS: Mapping[Scaling, _Needs] = {
    "tensorwise": _Needs(16, (8, 9), "0.10"),
    "rowwise": _Needs(16, (9, 0), "0.10"),
    "rowwise_with_gw_hp": _Needs(16, (9, 0), "0.10"),
    "mxfp8": _Needs(32, (10, 0), "0.17"),
    "mxfp8_with_gw_hp": _Needs(32, (10, 0), "0.17"),
}


def chosen(config: ModelConfig, options: Float8, tensor: int) -> tuple[set[str], set[str]]:
    """(linear modules that compute in eight bits, those that a pattern names and whose sizes on each of `tensor` ranks
    are no multiples of what the scaling asks for). Raises BackendError for a pattern without any, and if none is left.
    """
    # a router and the experts' stacks are no linear modules: they stay in the compute dtype
    shapes = {
        spec.name.removesuffix(".weight"): spec.shape
        for spec in parameter_specs(config)
        if spec.name.startswith("layers.") and spec.name.endswith("_proj.weight") and len(spec.shape) == 2
        if ".experts." not in spec.name
    }
    try:
        named = set[str]().union(
            *(
                matched(pattern, shapes, f"backend.options.float8_linears {number}")
                for number, pattern in enumerate(options.linears)
            )
        )
    except ValueError as error:
        raise BackendError(str(error)) from error
    multiple = NEEDS[options.scaling].multiple * tensor
    left_out = {name for name in named if any(size % multiple for size in shapes[name])}
    if left_out == named:
        name = min(named)
        raise BackendError(
            f"backend.options.float8: no linear module's sizes are multiples of {multiple}, as {options.scaling} asks "
            f"for{f' on {tensor} tensor parallel ranks' if tensor > 1 else ''}: {name} is "
            f"{' x '.join(map(str, shapes[name]))}: set float8=false, or choose other sizes"
        )
    return named - left_out, left_out


def share_of_products(config: ModelConfig, options: Float8, tensor: int) -> float:
    """Of the FLOPs of all matrix products, those of the linear modules that compute in eight bits."""
    modules, _ = chosen(config, options, tensor)
    specs = [spec for spec in parameter_specs(config) if len(spec.shape) > 1]
    of = {spec.name.removesuffix(".weight"): math.prod(spec.shape) for spec in specs}
    # a weight gradient in the compute dtype is one of the three products
    in_eight = 2 / 3 if options.scaling.endswith("with_gw_hp") else 1.0
    head = config.vocab_size * config.hidden_size
    every = sum(size for name, size in of.items() if name.startswith("layers.")) + head
    return in_eight * sum(of[name] for name in modules) / every


def check_float8(config: ModelConfig, options: Float8, tensor: int, tokens: int) -> None:
    """tokens: of a micro-batch on one rank. Raises BackendError, before anything is built, for what cannot be."""
    chosen(config, options, tensor)
    if not options.block_scaled:
        return
    if tensor > 1:
        raise BackendError(
            f"backend.options.float8 is {options.scaling} and backend.options.tensor_parallel is {tensor}: "
            "torchao's products of blocks are not split over ranks: set float8=tensorwise, or tensor_parallel=1"
        )
    if tokens % 32 and not options.scaling.endswith("with_gw_hp"):
        raise BackendError(
            f"backend.options.float8 is mxfp8 and a micro-batch has {tokens} tokens, no multiple of its blocks "
            "of 32: change batch.micro_batch_size or data.sequence_length, or set float8=mxfp8_with_gw_hp"
        )


def use_float8(model: nn.Module, config: ModelConfig, options: Float8, tensor: int) -> None:
    """Put torchao's linear modules in the places of those that `chosen` names.

    Raises BackendError if torchao or the device cannot.
    """
    modules, _ = chosen(config, options, tensor)
    needs = NEEDS[options.scaling]
    emulates = not torch.cuda.is_available()
    if not emulates and (found := torch.cuda.get_device_capability()) < needs.capability:
        raise BackendError(
            f"backend.options.float8={options.scaling} needs compute capability "
            f"{'.'.join(map(str, needs.capability))} and {torch.cuda.get_device_name()} has "
            f"{'.'.join(map(str, found))}: set {_what_runs(found)}"
        )
    try:
        if options.block_scaled:
            _use_blocks(model, modules, options, emulates)
        else:
            _use_scaled(model, modules, options, emulates)
    except ImportError as error:
        raise BackendError(
            f"backend.options.float8={options.scaling} needs torchao {needs.torchao} or newer ({error}): "
            "pip install 'weftrain[float8]', or set float8=false"
        ) from error


def _what_runs(capability: tuple[int, int]) -> str:
    runs = [name for name, needs in NEEDS.items() if needs.capability <= capability]
    return f"float8={runs[-1]}" if runs else "float8=false"


def _use_scaled(model: nn.Module, modules: Iterable[str], options: Float8, emulates: bool) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(
        Float8LinearConfig.from_recipe_name(options.scaling),
        emulate=emulates,
        enable_fsdp_float8_all_gather=options.gather,
    )
    wanted = set(modules)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in wanted)


def _use_blocks(model: nn.Module, modules: Iterable[str], options: Float8, emulates: bool) -> None:
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats.config import (
        MXFP8Dim0CastKernelChoice,
        MXFP8Dim1CastKernelChoice,
        ScaleCalculationMode,
    )
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    # torchao's MXFP8Linear emulates the forward only: its casts of weight gradients are CUDA kernels in every case
    casts = (
        (KernelPreference.EMULATED, MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH)
        if emulates
        else (KernelPreference.AUTO, MXFP8Dim0CastKernelChoice.TRITON, MXFP8Dim1CastKernelChoice.CUDA)
    )
    element, block = torch.float8_e4m3fn, 32
    in_high_precision = options.scaling.endswith("with_gw_hp")

    def product(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = mx_mm.apply(
            x, weight, element, element, element, block, *casts, ScaleCalculationMode.RCEIL, in_high_precision
        )
        return found

    wanted = set(modules)
    for name, linear in list(model.named_modules()):  # of a model whose first layers alone are here, not all
        if name in wanted and isinstance(linear, nn.Linear):
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, BlockScaledLinear(linear, product))


class BlockScaledLinear(nn.Linear):
    """A linear module whose products are `product(x, weight)`, [.., in] and [out, in] -> [.., out]."""

    def __init__(self, linear: nn.Linear, product: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._product(x, self.weight)
        return found if self.bias is None else found + self.bias.to(found.dtype)


# Gathering in float8: FSDP holds the fp32 weight in torchao's wrapper, which rounds it on its way to the other ranks


class GatherBytes:
    """In place of FSDP2's all-gather (`set_custom_all_gather`): gloo has no name for float8, and moves bytes."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        output, own = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return all_gather(output, own, group=group, async_op=async_op)


def unwrapped(tensor: Tensor) -> Tensor:
    """The fp32 numbers that a rank holds, of a parameter or gradient that may be a DTensor and wrapped."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    inner = getattr(local, "_tensor", None)
    return local if inner is None else inner


def forget_scale(parameter: Tensor) -> None:
    """Of a weight that was written otherwise than by an update; it is found again when the weight is gathered."""
    # not to_local(), which makes a view where gradients are recorded: torchao keeps the scale on the tensor itself
    local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    if hasattr(local, "_precomputed_scale"):
        local._precomputed_scale = None


def prepare_scales(model: nn.Module) -> None:
    """The scales of all weights that are gathered in float8, in one all-reduce and not one each. A collective."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)
