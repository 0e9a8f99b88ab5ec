"""How far a replay ends from what was released, plane by plane: each kind of tensor of the state, each kind of number
in the log.

Of a kind of tensor (weights, each moment) it is the L2 distance as a share of the L2 distance that the replay moved it,
from where it began. Of a kind of number it is the largest |a - b| / |b| of any line, b the replay's; and so of the
length of the weights' movement, which rounding changes far less than their place, but another learning rate as much.
What a release says is in no denominator, else a forger who goes far would come close. What is allowed is in
tolerance.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.objectives_section import MEASURES
from weftrain.core.parameters import PLANES
from weftrain.core.run.metrics import LATER

_EXACT = ("learning_rate", "skipped", "bearing_tokens", "tokens", "rows", "samples")  # of a line, in any fingerprint
KINDS = ("step", "evaluation", "score")
MOVEMENT = "movement"
STATE_KINDS = (*PLANES, MOVEMENT)


def state_distances(
    origin: Mapping[str, Tensor], released: Mapping[str, Tensor], replayed: Mapping[str, Tensor]
) -> dict[str, float]:
    """Of each kind of tensor, and of the length of the weights' movement. origin: where the replay began; moments that
    are not there began at 0.
    """
    apart: dict[str, float] = {}
    moved: dict[str, float] = {}
    there = 0.0
    for name in released:
        kind = name.partition("/")[0]
        left, right = released[name].double(), replayed[name].double()
        before = None if name not in origin else origin[name].double()
        apart[kind] = apart.get(kind, 0.0) + float((left - right).square().sum())
        moved[kind] = moved.get(kind, 0.0) + float((right if before is None else right - before).square().sum())
        if kind == "weights":
            there += float((left if before is None else left - before).square().sum())
    found = {kind: _share(math.sqrt(apart[kind]), math.sqrt(moved[kind])) for kind in apart}
    if "weights" in apart:
        length = math.sqrt(moved["weights"])
        found[MOVEMENT] = _share(abs(math.sqrt(there) - length), length)
    return found


def movement(origin: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> float:
    """How far the weights that a replay moved went from `origin`, as a share of their L2 norm there."""
    apart = whole = 0.0
    for name, before in origin.items():
        if name.startswith("weights/") and not torch.equal(before, replayed[name]):
            apart += float((replayed[name].double() - before.double()).square().sum())
            whole += float(before.double().square().sum())
    return _share(math.sqrt(apart), math.sqrt(whole))


@dataclass
class MeasuredLines:
    """The lines of a link that were released, against those of its replay.

    lines: of each kind (step, evaluation, score) how many were compared; equal: how many are bitwise equal. missing:
    lines that only one of the two has, or whose counts and rates differ, in words.
    """

    lines: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    equal: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    missing: list[str] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    first: int | None = None  # the first step with a line that is not equal

    def compare(self, released: Mapping[str, Any], replayed: Mapping[str, Any] | None) -> None:
        """A line of metrics.jsonl, and the numbers that its replay gave under the same names."""
        kind = released["kind"]
        self.lines[kind] += 1
        what = f"step {released['step']}" + (f", {released['set']}" if kind != "step" else "")
        if replayed is None:
            self._differs(released, f"{what}: was not measured here")
            return
        equal = True
        for key in replayed.keys() - released.keys() - set(LATER):
            self.missing.append(f"{what}: does not tell its {key.replace('_', ' ')}")
            equal = False
        for key, there in released.items():
            if key not in replayed:
                continue
            here = replayed[key]
            if _same(there, here):
                continue
            equal = False
            if key in _EXACT or isinstance(there, (bool, Mapping, str)):
                self.missing.append(f"{what}: its {key.replace('_', ' ')} is {there}, and here {here}")
                continue
            if key == "perplexity":  # a function of the loss
                continue
            name = key if kind == "step" else f"held-out {key}"
            least = 1.0 if key in (*MEASURES, *ROUTER_MEASURES) else 0.0  # margins and shares may be 0
            share = _share(abs(float(there) - float(here)), max(abs(float(here)), least))
            self.distances[name] = max(self.distances.get(name, 0.0), share)
        if equal:
            self.equal[kind] += 1
        elif self.first is None:
            self.first = released["step"]

    def _differs(self, released: Mapping[str, Any], words: str) -> None:
        self.missing.append(words)
        self.first = released["step"] if self.first is None else self.first

    @property
    def all_equal(self) -> bool:
        return self.lines == self.equal and not self.missing

    def words(self) -> Iterator[str]:
        yield from self.missing[:3]
        if len(self.missing) > 3:
            yield f"and {len(self.missing) - 3} more lines"


def _same(left: Any, right: Any) -> bool:
    return bool(left == right) or (left != left and right != right)


def _share(apart: float, whole: float) -> float:
    if not apart:
        return 0.0
    return apart / whole if whole and math.isfinite(apart) else math.inf
