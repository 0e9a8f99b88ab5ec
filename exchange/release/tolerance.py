"""What a replay under another fingerprint is allowed: what the kinds of entries that differ were measured to cause.

measured_differences.json, beside this file, has the largest distance that each kind of difference (`ROWS`) caused, for
each dtype that computes, pace, plane and number of steps; its first entry has the commands that make it again. What is
allowed is a multiple of the largest of any kind, between two measured steps on a straight line of logarithms. It is not
that of the kinds that differ: a record may claim whichever it likes, and which kind moves a bit most depends on the
model (two threads change nothing in a product that is too small to be divided). So a claim that nobody has measured
(another device, other libraries) gains no room either. Of a link of a chain, steps count from where the chain began.

Each kind of number has a `Room` of two limits. Up to the first (ACCEPTED times what was measured, and small enough to
say something: WIDEST) a distance is within tolerance. Beyond the second it is refused: REFUSED times what was measured,
or, where the table says nothing about the run (more steps, a faster pace, a wider model, another optimizer), what no
rounding explains (CAP). Between the two it is not covered, which confirms nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe
from weftrain.exchange.release.distance import MOVEMENT, STATE_KINDS

# How many times what was measured is accepted, and how many times is not yet refused. In fp32 the two are far from each
# other: where training is unstable any rounding may begin to grow at any step, and it has far to grow, so that of two
# seeds of one recipe one was a hundred times as far apart as the other. In bf16 it begins near where it ends.
ACCEPTED = 4.0
REFUSED: Mapping[str, float] = {"float32": 100.0, "bfloat16": 4.0}
# The least that is taken as measured: some roundings of fp32, where the measured runs happen to agree in every bit.
LEAST = 2.0**-20
_ROUNDING = 2.0**-24  # of a number in fp32, as a share of it
# Kind -> the largest distance that still says something: a tenth of the movement of the weights, a fifth of that of a
# moment, and of a loss a share that a few steps of training do not gain.
WIDEST: Mapping[str, float] = {
    "weights": 0.1,
    MOVEMENT: 0.02,
    "exp_avg": 0.2,
    "exp_avg_sq": 0.2,
    "loss": 0.02,
    "held-out loss": 0.02,
    "grad_norm": 0.2,
}
# Kind -> the distance beyond which no rounding is to blame, whatever was measured: weights that are hardly nearer to
# the replay's than those that it began from, moments further apart than two opposite ones of one size, half a loss, a
# norm eleven times as large. A test holds that nothing measured is so far apart (a norm once was 5.3).
CAP: Mapping[str, float] = {
    "weights": 0.9,
    MOVEMENT: 0.9,
    "exp_avg": 2.0,
    "exp_avg_sq": 2.0,
    "loss": 0.5,
    "held-out loss": 0.5,
    "grad_norm": 10.0,
}
CAP_OF_OTHERS = 1.0  # of a number that nobody measured: its own size
_LIKE = {"held-out loss": "loss"}  # measured under another name: it is the same mean over other rows
TABLE = Path(__file__).parent / "measured_differences.json"
_SHORTER = (
    "replay under the same fingerprint, or in shorter pieces: one link alone (--link), a release with more checkpoints"
)

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


def rows_of(differing: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """The rows of these entries of a fingerprint (name, released, here), in the table's order. An entry that nobody
    knows is a device's; sums of gradients that one side makes in bf16 are rounded otherwise.
    """
    found = set[str]()
    for key, released, here in differing:
        rounded = key == "reduction" and "bfloat16" in f"{released} {here}"
        found.add("precision" if rounded else _ROW_OF.get(key.partition(".")[0], "device"))
    return [row for row in ROWS if row in found]


def tolerance_is_used(rows: Iterable[str]) -> bool:
    """Whether a reader's tolerance counts: under the same fingerprint, or where only what computes nothing differs,
    every bit must be equal, whatever is given. Else a record could claim another version of Python and so be excused.
    """
    return bool(set(rows) - {"nothing"})


@dataclass(frozen=True)
class Chain:
    """What was trained in one piece. steps: from where it began. moved: distance.movement from there."""

    steps: int
    moved: float


@dataclass(frozen=True)
class Table:
    """measured_differences.json. width, layers: of the largest model that was measured. measured: row -> its
    differences, in words -> of how many seeds. moved: pace -> the largest share of their norm by which a measured run
    had moved its weights after each of `steps`, slowest pace first. distances: pace -> compute dtype -> row -> kind ->
    the largest distance after each of `steps`.
    """

    steps: tuple[int, ...]
    width: int
    layers: int
    measured: Mapping[str, Mapping[str, int]]
    moved: Mapping[str, Sequence[float]]
    distances: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]]

    def nearest(self, chain: Chain) -> tuple[int, str]:
        """The steps and the pace that are looked up for it: the slowest pace at which weights moved as far in as many
        steps; beyond the table its last of each.
        """
        steps = min(chain.steps, self.steps[-1])
        fast = (pace for pace, moved in self.moved.items() if chain.moved <= self._at(moved, steps))
        return steps, next(fast, list(self.moved)[-1])

    def moves_as_fast(self, chain: Chain) -> bool:
        """Whether in some measured run the weights moved as far in as many steps."""
        steps, pace = self.nearest(chain)
        return chain.moved <= self._at(self.moved[pace], steps)

    def distance(self, pace: str, compute: str, kind: str, steps: int) -> float:
        """The largest that any difference was measured to cause after so many steps."""
        kind = _LIKE.get(kind, kind)
        rows = self.distances[pace][compute].values()
        return max((self._at(kinds[kind], steps) for kinds in rows if kind in kinds), default=0.0)

    def _at(self, values: Sequence[float], steps: int) -> float:
        """After a measured number of steps, and between two of them on a straight line of logarithms. As a share of a
        movement that grows, a distance may fall: the first update of AdamW turns on the signs of small gradients.
        """
        after = next(number for number, step in enumerate(self.steps) if steps <= step)
        before = after - (self.steps[after] != steps and after > 0)
        if before == after or not values[before] or not values[after]:
            return max(values[before], values[after])
        share = math.log(steps / self.steps[before]) / math.log(self.steps[after] / self.steps[before])
        return float(values[before] ** (1 - share) * values[after] ** share)


def read_table(path: Path) -> Table:
    value: dict[str, Any] = json.loads(path.read_bytes())
    moved = dict(sorted(value["moved"].items(), key=lambda pace: max(pace[1])))
    return Table(tuple(value["steps"]), value["width"], value["layers"], value["measured"], moved, value["distances"])


@cache
def table() -> Table:
    return read_table(TABLE)


@dataclass(frozen=True)
class Room:
    """Of one kind of number. Up to `near` a distance is within tolerance, beyond `far` it is refused, and between the
    two it says nothing: `why`, and what would.
    """

    near: float
    far: float
    why: str = ""


@dataclass(frozen=True)
class Allowance:
    """What may differ. rooms: kind -> its room. others: that of any kind without one. basis: what the rooms are made
    from, in words.
    """

    rooms: Mapping[str, Room] = field(default_factory=dict)
    others: Room = Room(0.0, 0.0)
    basis: str = ""

    def room(self, kind: str) -> Room:
        return self.rooms.get(kind, self.others)

    def beyond(self, distances: Mapping[str, float]) -> list[str]:
        """The kinds that are refused. Nothing allows a distance that is no number."""
        return [kind for kind, distance in distances.items() if not distance <= self.room(kind).far]

    def not_covered(self, distances: Mapping[str, float]) -> dict[str, str]:
        """Kind -> why, of those whose distance is not refused and says nothing."""
        rooms = {kind: self.room(kind) for kind in distances}
        return {kind: room.why for kind, room in rooms.items() if room.near < distances[kind] <= room.far}


def allowance(
    recipe: Recipe, fingerprint: Mapping[str, Any], rows: Sequence[str], chain: Chain, given: float | None
) -> Allowance:
    """What entries of these rows may cause. fingerprint: of the replay. given: a reader's bound of weights and moments,
    in place of the table's.
    """
    if not tolerance_is_used(rows) or given == 0.0:
        return Allowance()
    found = _measured(recipe, fingerprint, rows, chain)
    if given is None:
        return found
    return replace(found, rooms={**found.rooms, **dict.fromkeys(STATE_KINDS, Room(given, given))})


def _measured(recipe: Recipe, fingerprint: Mapping[str, Any], rows: Sequence[str], chain: Chain) -> Allowance:
    known, compute = table(), recipe.precision.compute
    outside = _outside(recipe, fingerprint, chain, known)
    steps, pace = known.nearest(chain)
    # products may be rounded to bf16, or to ten bits: that is no reason to accept more, but to refuse less
    claimed = "bfloat16" if "precision" in rows else compute
    deeper = max(1.0, recipe.model.num_layers / known.layers)  # eight layers were up to 4.2 times as far apart as two
    rooms = {}
    for kind, widest in WIDEST.items():
        least = rounding(recipe, kind, chain)
        found = (deeper * _caused(recipe, known, pace, dtype, kind, steps) for dtype in (compute, claimed))
        own, other = (max(distance, least) for distance in found)
        near = min(ACCEPTED * own, widest)
        far = max(REFUSED[compute] * own, REFUSED[claimed] * other)
        why = outside or (
            f"honest runs of {steps} steps in {claimed} end up to {other:.2g} apart, and more than {near:.2g} would "
            "pass what was not trained so"
        )
        rooms[kind] = Room(near, CAP[kind] if outside else min(far, CAP[kind]), f"{why}: {_SHORTER}")
    # a length is never further off than the weights are apart, so that it refuses nothing which they do not
    rooms[MOVEMENT] = replace(rooms[MOVEMENT], far=max(rooms[MOVEMENT].far, rooms["weights"].far))
    basis = (
        f"{ACCEPTED:g} x the largest measured, {compute}, {steps} steps, {pace} pace, and no more than says something"
    )
    unmeasured = [row for row in rows if row not in known.measured and row != "nothing"]
    if unmeasured:
        basis += f"; {', '.join(unmeasured)}: not measured, so as all others"
    return Allowance(rooms, Room(0.0, CAP_OF_OTHERS, f"no difference was measured of it: {_SHORTER}"), basis)


def _caused(recipe: Recipe, known: Table, pace: str, compute: str, kind: str, steps: int) -> float:
    """The largest distance that a measured difference makes likely in this model.

    Rounding turns the weights' movement by the distance of the weights, in a direction that has nothing to do with its
    own: of N weights that changes its length by one part in sqrt(N) of that, so a smaller model's by more than what was
    measured of a larger one (at width 48 1.7e-4 in bf16, where the weights were 0.045 apart).
    """
    found = known.distance(pace, compute, kind, steps)
    if kind != MOVEMENT:
        return found
    weights = sum(math.prod(spec.shape) for spec in recipe.parameters if spec.trained)
    return max(found, known.distance(pace, compute, "weights", steps) / math.sqrt(max(weights, 1)))


def rounding(recipe: Recipe, kind: str, chain: Chain) -> float:
    """The least that is taken as measured. At a low rate the weights move by little more than fp32 rounds them to at
    each step, and so does a moment whose beta is near 1; rates as low were not measured.
    """
    optimizer = recipe.optimizer
    beta = {"exp_avg": optimizer.beta1, "exp_avg_sq": optimizer.beta2}.get(kind)
    moved = chain.moved if kind in ("weights", MOVEMENT) else 1.0 if beta is None else 1 - beta**chain.steps
    return max(_ROUNDING * math.sqrt(chain.steps) / moved, LEAST) if moved else math.inf


def _outside(recipe: Recipe, fingerprint: Mapping[str, Any], chain: Chain, known: Table) -> str | None:
    """Why the table does not say how far honest runs of this recipe may be apart; None: it does."""
    if fingerprint.get("float8") or fingerprint.get("state_format") in ("bf16_moments", "int8_moments"):
        return "it rounds products or moments to fewer bits than any measured run"
    if recipe.model.experts is not None:
        return "how a router's choices turn on rounding was not measured"
    if recipe.optimizer.name != "adamw":
        return f"nothing was measured of the optimizer {recipe.optimizer.name}"
    if recipe.model.hidden_size > known.width:
        return f"the model is {recipe.model.hidden_size:,} wide, and differences were measured to {known.width}"
    if chain.steps > known.steps[-1]:
        return f"{chain.steps:,} steps in one piece, and differences were measured to {known.steps[-1]}"
    if not known.moves_as_fast(chain):
        return f"the weights moved by {chain.moved:.2g} of their norm, faster than in any measured run"
    return None
