"""Replay: train a link of a release again, and compare the state it ends in with the one that was released, bit for
bit.

A hash shows that nothing was altered since the release was made; only replay shows that the state was *trained* as the
record says. Results can be bitwise identical only under the same fingerprint (versions, instruction set, threads,
kernels, reduction). Under another one, replay reports how far the two states are apart, relative to the distance that
training moved the weights, and which entries of the fingerprint differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.backend import Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.initialization import draw
from weftrain.core.order.batch import BatchSource
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.continuation import check_recorded_order
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage
from weftrain.core.run.metrics import effective_records
from weftrain.core.run.run_folder import differences
from weftrain.exchange.release.release import Link
from weftrain.exchange.release.verify import Verified

# As a share of the distance that the link moved the weights. Other kernels and thread counts stay ten times below it.
DEFAULT_TOLERANCE = 0.05

# Prepares a run of this recipe, as close to this fingerprint as the machine allows.
Prepare = Callable[[Recipe, Plan, Mapping[str, Any]], Run]
OpenSource = Callable[[Recipe], BatchSource]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose replay is not bitwise identical. ulps: largest distance in units in the last place. largest:
    largest absolute difference.
    """

    name: str
    elements: int
    differing: int
    ulps: int
    largest: float


@dataclass(frozen=True)
class LinkReport:
    """Result of replaying one link. relative: L2 distance between replayed and released weights, divided by the
    distance that the link moved them.
    """

    link: Link
    tensors: int
    equal: int
    differences: tuple[TensorDifference, ...]
    losses: int  # logged steps
    equal_losses: int
    relative: float
    fingerprint: tuple[tuple[str, Any, Any], ...]  # key, released, here
    tolerance: float

    @property
    def verdict(self) -> str:
        """'equal', 'within tolerance' (another fingerprint), or 'different'."""
        if self.equal == self.tensors and self.equal_losses == self.losses:
            return "equal"
        return "within tolerance" if self.fingerprint and self.relative <= self.tolerance else "different"


def chosen_links(links: Sequence[Link], numbers: Sequence[int], share: float | None, seed: int) -> list[Link]:
    """The links with these numbers, else a random share of them (at least one), else all. Raises ReleaseError for a
    link that does not exist.
    """
    known = {link.link: link for link in links}
    for number in numbers:
        if number not in known:
            raise ReleaseError(f"there is no link {number}: the release has {len(links)}, counted from 1")
    if numbers:
        return [known[number] for number in numbers]
    if share is None:
        return list(links)
    if not 0 < share <= 1:
        raise ReleaseError(f"--sample {share}: give a share of the links, above 0 and up to 1")
    count = max(1, math.ceil(share * len(links)))
    return sorted(random.Random(seed).sample(list(links), count), key=lambda link: link.link)


def replay_link(
    folder: Path,
    verified: Verified,
    link: Link,
    open_source: OpenSource,
    prepare: Prepare,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: Callable[[int], None] = lambda step: None,
) -> LinkReport:
    """Train `link` again from its starting state, and compare. The release must have been verified just before.

    progress: called with the number of completed steps of the run after each step.
    """
    released, manifest = checkpoint.load(folder / "checkpoints" / folder_name(link.stop_step), verified=True)
    start: State | None = None
    if link.start is not None:
        start, _ = checkpoint.load(folder / "checkpoints" / folder_name(link.first_step), verified=True)
    check_recorded_order(manifest)
    recipe = recorded_recipe(manifest["recipe"], str(folder / folder_name(link.stop_step))).recipe
    if start is None:
        weights = {f"weights/{spec.name}": draw(spec, recipe.model, recipe.seed) for spec in recipe.parameters}
        origin: Mapping[str, Tensor] = weights
    else:
        origin = start.tensors
    state, fingerprint, losses = _train(
        verified.lineage, link, start, manifest["fingerprint"], open_source, prepare, progress
    )
    found = [_compare(name, released.tensors[name], state.tensors[name]) for name in sorted(released.tensors)]
    equal_losses, logged = _compare_losses(folder, link, losses)
    return LinkReport(
        link,
        len(found),
        sum(difference is None for difference in found),
        tuple(difference for difference in found if difference is not None),
        logged,
        equal_losses,
        _relative(origin, released.tensors, state.tensors),
        tuple((key, old, new) for key, old, new in differences(manifest["fingerprint"], fingerprint)),
        tolerance,
    )


def _train(
    line: Lineage,
    link: Link,
    start: State | None,
    wanted: Mapping[str, Any],
    open_source: OpenSource,
    prepare: Prepare,
    progress: Callable[[int], None],
) -> tuple[State, dict[str, Any], dict[int, tuple[float, float]]]:
    """The state after the link, the fingerprint of its last piece, and loss and gradient norm by completed steps.

    A link that the record trained in several segments (resumed, with changed keys perhaps) is trained in the same
    pieces.
    """
    state, losses, step = start, {}, link.first_step
    fingerprint: dict[str, Any] = {}
    while step < link.stop_step:
        try:
            segment = line.segment_at(step)
        except ValueError as error:
            raise ReleaseError(f"link {link.link}: {error}: nothing says how it was trained") from error
        stop = link.stop_step if segment.stop_step is None else min(segment.stop_step, link.stop_step)
        recipe = recorded_recipe(dict(segment.recipe), LEDGER).recipe
        run = prepare(recipe, Plan(step, stop, log_every_steps=recipe.log.every_steps), wanted)
        try:
            if state is not None:
                run.import_state(state)
            for result in run.train(open_source(recipe)):
                losses[result.step + 1] = (float(result.loss), float(result.grad_norm))
                progress(result.step + 1)
            snapshot = run.export_state()
            # the run is about to end
            state = replace(snapshot, tensors={name: snapshot.tensors[name] for name in snapshot.tensors})
            fingerprint = run.fingerprint().as_json()
        finally:
            run.close()
        step = stop
    assert state is not None
    return state, fingerprint, losses


def _compare(name: str, released: Tensor, replayed: Tensor) -> TensorDifference | None:
    """None where every bit is equal, the sign of zero and the payload of NaN included."""
    if released.shape != replayed.shape or released.dtype != replayed.dtype:
        return TensorDifference(name, released.numel(), released.numel(), 1 << 32, math.inf)
    left, right = released.contiguous().view(torch.int32), replayed.contiguous().view(torch.int32)
    differing = left != right
    count = int(differing.sum())
    if not count:
        return None
    ulps = (_ordered(left[differing]) - _ordered(right[differing])).abs().max()
    largest = (released.double() - replayed.double()).abs().max()
    return TensorDifference(name, released.numel(), count, int(ulps), float(largest))


def _ordered(bits: Tensor) -> Tensor:
    """fp32 bit patterns as integers in the order of the numbers, so that a difference counts units in the last
    place.
    """
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, -(wide & 0x7FFFFFFF), wide)


def _relative(origin: Mapping[str, Tensor], released: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> float:
    apart = moved = 0.0
    for name in released:
        if name.startswith("weights/"):
            apart += float((released[name].double() - replayed[name].double()).square().sum())
            moved += float((released[name].double() - origin[name].double()).square().sum())
    return math.sqrt(apart / moved) if moved else (0.0 if not apart else math.inf)


def _compare_losses(folder: Path, link: Link, losses: Mapping[int, tuple[float, float]]) -> tuple[int, int]:
    """How many logged steps of the link have the recorded loss and norm, bit for bit; and how many there are."""
    logged = equal = 0
    for record in effective_records(folder):
        if record["kind"] == "step" and link.first_step < record["step"] <= link.stop_step:
            logged += 1
            # not logged here: the record is of no step that the recipe logs
            here = losses.get(record["step"], (None, None))
            pairs = zip((record["loss"], record.get("grad_norm")), here, strict=True)
            equal += all(left == right or (left != left and right != right) for left, right in pairs)
    return equal, logged
