"""New inputs for every sample, so that no answer to earlier inputs fits, and none lies in the cache.

The values of an example are turned round by a random distance and scaled by a random factor: all of them change, their
distribution does not, and writing them costs one pass. The numbers come from the operating system, so that no kernel
can know them before.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import Arguments, Op

INCOMING = "incoming gradient"  # the name of the outputs' gradients among the inputs
_SCALES = (0.8, 1.25)


class Inputs:
    """Copies of an example's arguments, used in turn; each holds values of its own whenever it is used.

    incoming: a gradient of each output, for a backward. ahead: the values are written right after a copy was used and
    not right before it is used again, so that by then the other copies have displaced it from the cache.
    """

    def __init__(
        self, op: Op, example: Arguments, copies: int, incoming: Sequence[Tensor] = (), *, ahead: bool
    ) -> None:
        self._op, self._ahead = op, ahead
        self._example: Arguments = {**example, INCOMING: list(incoming)}
        self._copies = [_map(torch.clone, self._example) for _ in range(copies)]
        self._seeds = [0] * copies
        self._turn = 0
        for copy in range(copies):
            self.fill(copy)

    def take(self) -> int:
        """The copy whose turn it is."""
        copy, self._turn = self._turn, (self._turn + 1) % len(self._copies)
        return copy

    def before(self, copy: int) -> None:
        """Called by the clock before each attempt."""
        if not self._ahead:
            self.fill(copy)

    def after(self, copy: int) -> None:
        """Called when a sample was looked at."""
        if self._ahead:
            self.fill(copy)

    def fill(self, copy: int) -> None:
        """Write new values into a copy."""
        self._seeds[copy] = secrets.randbits(64)
        with torch.no_grad():
            for (name, base), (_, into) in zip(_named(self._example), _named(self._copies[copy]), strict=True):
                self._vary(self._seeds[copy], name, base, into)

    def given(self, copy: int) -> tuple[Arguments, list[Tensor]]:
        """The arguments of a call and the incoming gradients, as aliases: what a kernel does to a tensor object rather
        than to its values stays with it.
        """
        arguments = _map(torch.Tensor.detach, self._copies[copy])
        return arguments, arguments.pop(INCOMING)

    def held(self, copy: int) -> Arguments:
        """The arguments themselves, with what the op has updated in place."""
        return {name: value for name, value in self._copies[copy].items() if name != INCOMING}

    def original(self, copy: int) -> tuple[Arguments, list[Tensor]]:
        """The arguments and incoming gradients as they were before the call."""
        if not self._op.in_place:
            return self.held(copy), self._copies[copy][INCOMING]
        again = _map(torch.clone, self._example)
        for (name, base), (_, into) in zip(_named(self._example), _named(again), strict=True):
            self._vary(self._seeds[copy], name, base, into)
        return again, again.pop(INCOMING)

    def changed(self, copy: int) -> str | None:
        """The name of an input that the op does not overwrite and that has other values than before the call."""
        for (name, base), (_, found) in zip(_named(self._example), _named(self._copies[copy]), strict=True):
            if name.partition("[")[0] in self._op.in_place:
                continue
            expected = torch.empty_like(base)
            self._vary(self._seeds[copy], name, base, expected)
            if not torch.equal(expected, found):
                return name
        return None

    def storages(self, copy: int) -> dict[int, str]:
        """Where the memory of each input begins -> its name."""
        return {_storage(tensor): name for name, tensor in _named(self._copies[copy]) if tensor.numel()}

    def _vary(self, seed: int, name: str, base: Tensor, into: Tensor) -> None:
        scale = 1.0
        if not self._varies(name.partition("[")[0], base):
            into.copy_(base)
            return
        if base.is_floating_point():
            scale = random.Random(f"{seed} {name}").uniform(*_SCALES)
        # the same distance for tensors of one size: a weight keeps its moments
        distance = int(random.Random(seed).random() * base.numel())
        if not (base.is_contiguous() and into.is_contiguous()):
            turned = torch.roll(base, distance)
            into.copy_(turned * scale if base.is_floating_point() else turned)
            return
        source, target, kept = base.view(-1), into.view(-1), base.numel() - distance
        for part, there in ((source[distance:], target[:kept]), (source[:distance], target[kept:])):
            if base.is_floating_point():
                torch.mul(part, scale, out=there)
            else:
                there.copy_(part)

    def _varies(self, name: str, tensor: Tensor) -> bool:
        """Tables and document boundaries have a form that must stay; everything that is learned or measured varies."""
        if name in ("labels", INCOMING):
            return True
        return name in self._op.differentiable if self._op.differentiable else tensor.is_floating_point()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _named(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value) if isinstance(item, Tensor))


def _map(change: Any, arguments: Arguments) -> Arguments:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in arguments.items()}
