"""A pipeline's stages, whole on each rank that has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.decoder import bind_parameters, memory_of_weights
from weftrain.backends.common.step import present
from weftrain.backends.common.sums import OrderedSum, TreeSum
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.replicated import HeldWhole
from weftrain.backends.cuda.stage import Part, RankTokens
from weftrain.backends.cuda.tree import pieces, tree_all_reduce
from weftrain.core.model import Decoder
from weftrain.core.parameters import ParameterSpec


class ReplicatedStages(HeldWhole):
    """The stages of a pipeline, whole on each rank that has them. Gradients are taken after each backward and summed
    over the ranks after the last one: DDP's hooks reduce what one backward pass of a whole model gives, and zero-bubble
    schedules call none of them (pytorch/pytorch#144530).
    """

    def __init__(
        self,
        decoder: Decoder,
        parts: Sequence[Part],
        specs: Sequence[ParameterSpec],
        options: CudaOptions,
        compute_dtype: torch.dtype,
        device: torch.device,
        sums: OrderedSum | TreeSum,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._parts, self._sums, self._group = parts, sums, group
        self.weights = memory_of_weights(specs, compute_dtype, device)
        pads = not isinstance(sums, TreeSum)  # padded products have other bits than those of a layout that does not pad
        self._bound = bind_parameters(decoder, specs, self.weights, compute_dtype, device, pads=pads)
        self._parameters, self.copies = self._bound.parameters, self._bound.copies
        self._compute_dtype, self._reduce_dtype = compute_dtype, getattr(torch, options.reduce)
        self._size = dist.get_world_size(group)

    def loss(self, tokens: RankTokens, dropout_keys: Tensor | None) -> Tensor:
        raise NotImplementedError("a stage computes no loss by itself: see pipeline.py")

    @contextlib.contextmanager
    def micro_batch(self, last: bool, part: int = 0) -> Iterator[None]:
        yield
        for name in self._parts[part].parameters:
            parameter = self._parameters.get(name)  # None: no gradient reaches it
            if parameter is not None and parameter.grad is not None:
                self._sums.add(name, parameter.grad)
                parameter.grad = None

    def take_gradients(self) -> dict[str, Tensor]:
        if isinstance(self._sums, TreeSum):
            blocks = [present(block, self._parameters) for block in self._sums.partial_sums()]
            gradients = tree_all_reduce(blocks, self._sums.count // self._size, self._group)
        else:
            gradients = present(self._sums.totals(), self._parameters)
            if self._size > 1:
                gradients = self._all_reduced(gradients)
        self._sums.clear()
        return {name: self._bound.own(name, gradient).contiguous() for name, gradient in gradients.items()}

    def _summed_in(self, name: str) -> torch.dtype:
        return self._reduce_dtype if self._parameters[name].dtype == self._compute_dtype else torch.float32

    def _all_reduced(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 parameters in fp32, the others in the dtype that is asked for."""
        found: dict[str, Tensor] = {}
        for dtype in dict.fromkeys((torch.float32, self._reduce_dtype)):  # a set's order differs from rank to rank
            of_dtype = {name: one.to(dtype) for name, one in gradients.items() if self._summed_in(name) == dtype}
            for names in pieces(of_dtype):
                flat = torch.cat([of_dtype[name].reshape(-1) for name in names])
                dist.all_reduce(flat, group=self._group)
                parts = flat.split([of_dtype[name].numel() for name in names])
                found |= {name: part.view_as(of_dtype[name]) for name, part in zip(names, parts, strict=True)}
        return {name: found[name] for name in gradients}
