"""A model that every rank holds whole, with torch's DDP (`RankModel`)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from weftrain.backends.common.decoder import Bound, bind_parameters, memory_of_weights
from weftrain.backends.common.step import present
from weftrain.backends.common.sums import OrderedSum, TreeSum, take_at_once
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.stage import RankTokens
from weftrain.backends.cuda.tree import tree_all_reduce
from weftrain.core.model import Decoder
from weftrain.core.parameters import ParameterSpec


class HeldWhole:
    """A model or stages of it that each of `_size` ranks holds whole: nothing is cut, and nothing is assembled."""

    _bound: Bound
    _size: int
    weights: dict[str, Tensor]

    def owners(self, name: str) -> int:
        return self._size

    def gather_rows(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(own)

    def whole(self, name: str, owned: Tensor) -> Tensor:
        return owned

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def place_weight(self, name: str, whole: Tensor) -> None:
        if name in self._bound.frozen:
            self._bound.place_frozen(name, whole)
        else:
            self.weights[name].copy_(whole)

    def updated(self) -> None:
        self._bound.refresh_columns()

    def refresh(self) -> None:
        self._bound.refresh()


class Replicated(HeldWhole):
    """DDP: every rank holds the whole model, in masters and, in bf16, copies, as the local backend does."""

    def __init__(
        self,
        model: Decoder,
        specs: Sequence[ParameterSpec],
        options: CudaOptions,
        compute_dtype: torch.dtype,
        device: torch.device,
        sums: OrderedSum | TreeSum,
    ) -> None:
        """sums: adds the gradients of this rank's micro-batches. With a TreeSum the ranks' sums are added in the same
        tree (tree.py); otherwise the last micro-batch is added while DDP reduces it.
        """
        self._sums, self._in_tree = sums, isinstance(sums, TreeSum)
        self.weights = memory_of_weights(specs, compute_dtype, device)
        # padded products have other bits than those of a layout that does not pad
        self._bound = bind_parameters(model, specs, self.weights, compute_dtype, device, pads=not self._in_tree)
        self._parameters, self.copies = self._bound.parameters, self._bound.copies
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        self._compute_dtype, self._reduce_dtype = compute_dtype, getattr(torch, options.reduce)
        self._size = dist.get_world_size()
        self._reduced: dict[str, Tensor] = {}
        self._reduces = True  # DDP reduces the gradients of the micro-batch that runs; else they are added to the sums
        take_at_once(self._parameters, sums.add, lambda: not self._reduces)
        buffers = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers"
        )
        self._ddp = DistributedDataParallel(
            model,
            init_sync=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=options.bucket_mib,
            **cast(Any, {buffers: False}),
        )
        # torch refuses annotations that are strings
        self._ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))

    def loss(self, tokens: RankTokens, dropout_keys: Tensor | None) -> Tensor:
        loss: Tensor = self._ddp(*tokens, dropout_keys)
        return loss

    @contextlib.contextmanager
    def micro_batch(self, last: bool, part: int = 0) -> Iterator[None]:
        self._reduces = last and not self._in_tree
        with contextlib.nullcontext() if self._reduces else self._ddp.no_sync():
            yield

    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Sum a bucket over the ranks, with the earlier micro-batches' sums; fp32 parameters in fp32."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        names = [self._names[parameter] for parameter in parameters]
        sums = self._sums.totals()
        wanted = self._reduce_dtype if buffer.dtype == self._compute_dtype else torch.float32
        if not sums and buffer.dtype == wanted:
            if self._size == 1:
                return _done(buffer)
            return cast(
                "Future[Tensor]", dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])
            )
        flat = torch.cat(
            [
                (sums[name] + gradient if sums else gradient.float()).reshape(-1)
                for name, gradient in zip(names, bucket.gradients(), strict=True)
            ]
        )
        flat = flat.to(wanted) if self._size > 1 else flat

        def keep(_: Any) -> Tensor:
            for name, piece, gradient in zip(
                names,
                flat.split([gradient.numel() for gradient in bucket.gradients()]),
                bucket.gradients(),
                strict=True,
            ):
                self._reduced[name] = piece.view_as(gradient)
            return buffer

        if self._size == 1:
            keep(None)
            return _done(buffer)
        return cast("Future[Tensor]", dist.all_reduce(flat, async_op=True).get_future().then(keep))

    def take_gradients(self) -> dict[str, Tensor]:
        if isinstance(self._sums, TreeSum):
            blocks = [present(block, self._parameters) for block in self._sums.partial_sums()]
            gradients = tree_all_reduce(blocks, self._sums.count // self._size, None)
        else:
            found = {name: self._reduced.get(name, parameter.grad) for name, parameter in self._parameters.items()}
            gradients = present(found, self._parameters)
        self._sums.clear()
        self._reduced = {}
        for parameter in self._parameters.values():
            parameter.grad = None
        return {name: self._bound.own(name, gradient).contiguous() for name, gradient in gradients.items()}


def _done(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(tensor)
    return future
