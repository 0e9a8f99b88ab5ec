"""How far a replay ends from what was released, plane by plane: each kind of tensor of the state, each kind of number
in the log.

Of a kind of tensor (weights, each moment) it is the L2 distance as a share of the L2 distance that training moved it,
from where the replay began. Of a kind of number it is the largest |a - b| / |a| of any line.

What is allowed where results cannot be bitwise equal follows from which entries of the fingerprint differ (`ROWS`), or
is a number that the reader gives. For entries that change arithmetic it is ALLOWED: in fp32 two to ten times the
largest distance that was measured, and otherwise twice that. Two threads in place of one caused in two links of 20
steps of crystal_demo, whose rates are so high that rounding grows fast, weights 1.5e-3, exp_avg 1.1e-2, exp_avg_sq
5.4e-3, loss 4.1e-3, grad_norm 3.0e-2; of amber_demo it is a hundred times smaller.

The dtype and the rate decide more than the kind of difference (docs/measurements.md): after 16 steps of crystal_demo
the weights of two threads are 4e-5 from those of one in fp32, 3e-2 in bf16, and in bf16 with its full rate from the
fourth step on 0.7. At such a rate an honest replay in bf16 is beyond ALLOWED from its eighth step on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.objectives_section import MEASURES
from weftrain.core.run.metrics import LATER

# Kind -> (allowed where both compute in fp32, allowed otherwise).
ALLOWED: Mapping[str, tuple[float, float]] = {
    "weights": (0.05, 0.1),
    "exp_avg": (0.05, 0.1),
    "exp_avg_sq": (0.05, 0.1),
    "loss": (0.02, 0.04),
    "grad_norm": (0.15, 0.3),
    "held-out loss": (0.01, 0.02),
    **dict.fromkeys((*MEASURES, *ROUTER_MEASURES), (0.05, 0.1)),
}
_EXACT = ("learning_rate", "skipped", "bearing_tokens", "tokens", "rows", "samples")  # of a line, in any fingerprint
KINDS = ("step", "evaluation", "score")


@dataclass(frozen=True)
class Distances:
    """kind -> distance; 0 where every bit is equal."""

    by_kind: Mapping[str, float]

    def beyond(self, allowed: Mapping[str, float]) -> list[str]:
        """The kinds that are further away than allowed; of other kinds nothing may differ."""
        return [kind for kind, distance in self.by_kind.items() if not distance <= allowed.get(kind, 0.0)]


# Entries of the fingerprint (the first part of their names) by what a difference in them can change.
ROWS: Mapping[str, tuple[str, ...]] = {
    "threads": ("threads",),
    "instruction set": (
        *("processor", "cpu_capability", "mkldnn", "onednn_max_cpu_isa", "mkl_cbwr", "mkl_enable_instructions"),
    ),
    "kernels": ("kernels",),
    "layout": (
        *("backend", "ranks", "degrees", "parallel", "reduction", "reduce_every_micro_batch", "collectives"),
        *("compile", "cuda_graphs", "activation_checkpointing", "activations", "micro_batch_size"),
    ),
    # in which a bit may be kept, rounded or computed otherwise, on devices and with libraries that nobody has measured
    "precision": (
        *("compute", "float8", "state_format", "float32_matmul_precision", "onednn_default_fpmath_mode"),
        *("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"),
        *("allow_fp16_accumulation", "cudnn_allow_tf32"),
    ),
    "libraries": ("torch", "cuda", "cublas", "cudnn", "driver", "mkl", "onednn"),
    "device": (
        *("device", "device_type", "capability", "multiprocessors", "cublas_workspace_config"),
        "deterministic_algorithms",
    ),
    # computes nothing by itself: what differs only here must be equal in every bit
    "nothing": ("python", "tier", "code"),
}
_ROW_OF = {key: row for row, keys in ROWS.items() for key in keys}


def rows_of(keys: Iterable[str]) -> list[str]:
    """The rows of these entries of a fingerprint, in the table's order. An entry that nobody knows is a device's."""
    found = {_ROW_OF.get(key.partition(".")[0], "device") for key in keys}
    return [row for row in ROWS if row in found]


def allowed(compute: str, given: float | None, rows: Sequence[str]) -> dict[str, float]:
    """Kind -> what is allowed where entries of these rows differ. compute: precision.compute of the recipe. given: for
    weights and moments, instead of the table's.
    """
    if not tolerance_is_used(rows):
        return dict.fromkeys(ALLOWED, 0.0)
    place = 0 if compute == "float32" else 1
    found = {kind: bounds[place] for kind, bounds in ALLOWED.items()}
    if given is not None:
        found |= dict.fromkeys(("weights", "exp_avg", "exp_avg_sq"), given)
        if given == 0.0:
            found = dict.fromkeys(found, 0.0)
    return found


def tolerance_is_used(rows: Iterable[str]) -> bool:
    """Whether a reader's tolerance counts: under the same fingerprint, or where only what computes nothing differs,
    every bit must be equal, whatever is given. Else a record could claim another version of Python and so be excused.
    """
    return bool(set(rows) - {"nothing"})


def state_distances(
    origin: Mapping[str, Tensor], released: Mapping[str, Tensor], replayed: Mapping[str, Tensor]
) -> dict[str, float]:
    """Of each kind of tensor. origin: where the replay began; moments that are not there began at 0."""
    apart: dict[str, float] = {}
    moved: dict[str, float] = {}
    for name in released:
        kind = name.partition("/")[0]
        here = released[name].double()
        before = origin.get(name)
        apart[kind] = apart.get(kind, 0.0) + float((here - replayed[name].double()).square().sum())
        moved[kind] = moved.get(kind, 0.0) + float((here if before is None else here - before.double()).square().sum())
    return {kind: _share(math.sqrt(apart[kind]), math.sqrt(moved[kind])) for kind in apart}


def movement(origin: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    """How far the weights that training moved went from `origin`, as a share of their L2 norm there."""
    apart = whole = 0.0
    for name, before in origin.items():
        if name.startswith("weights/") and not torch.equal(before, end[name]):
            apart += float((end[name].double() - before.double()).square().sum())
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
            name = "held-out loss" if kind != "step" and key == "loss" else key
            least = 1.0 if key in (*MEASURES, *ROUTER_MEASURES) else 0.0  # margins and shares may be 0
            share = _share(abs(float(there) - float(here)), max(abs(float(there)), least))
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
