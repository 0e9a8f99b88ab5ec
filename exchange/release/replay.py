"""Replay: train a link of a release again, and compare the state it ends in with the one that was released, bit for
bit; and every measurement on the way, held-out losses among them.

A hash shows that nothing was altered since the release was made; only replay shows that the state was *trained* as the
record says. Results can be bitwise identical only under the same fingerprint (versions, instruction set, threads,
kernels, reduction). Under another one, replay reports how far weights, moments and measurements are apart
(distance.py), what the entries of the fingerprint that differ were measured to cause, and what that does not cover
(tolerance.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.backend import Plan, Run, State, StepResult, plan_of
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.evaluators import Evaluator, HeldOutLoss
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.initialization import draw
from weftrain.core.order.batch import BatchSource, EvaluationSource
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.continuation import check_recorded_order
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage
from weftrain.core.run.metrics import effective_records
from weftrain.core.run.run_folder import differences
from weftrain.core.run.scores import RECORD, SCORE, score_numbers
from weftrain.exchange.release.claims import DATASET_SCORES, HELD_OUT, LOSSES, STATES, Claim
from weftrain.exchange.release.distance import KINDS, STATE_KINDS, MeasuredLines, movement, state_distances
from weftrain.exchange.release.release import Link
from weftrain.exchange.release.tolerance import Allowance, Chain, allowance, rows_of
from weftrain.exchange.release.verify import Verified

# Prepares a run of this recipe, as close to this fingerprint as the machine allows.
Prepare = Callable[[Recipe, Plan, Mapping[str, Any]], Run]


class Sources(NamedTuple):
    """The data of a recipe: what it trains on, the held-out sets that it is measured on, and its evaluations on other
    datasets, of those that are here.
    """

    training: Callable[[Recipe], BatchSource]
    held_out: Callable[[Recipe], Sequence[EvaluationSource]]
    scored: Callable[[Recipe], Sequence[Evaluator]]


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
    """Result of replaying one link. distances: kind -> distance, of those that differ. allowed: what of that another
    fingerprint may cause. chained, steps: links that were trained in one piece up to this one's end, each from the
    state that the one before was replayed to, and their steps. fingerprint: of any of these links.
    """

    link: Link
    tensors: int
    equal: int
    differences: tuple[TensorDifference, ...]
    lines: MeasuredLines
    distances: Mapping[str, float]
    fingerprint: tuple[tuple[str, Any, Any], ...]  # key, released, here, of those that differ
    unrecorded: tuple[str, ...]  # keys that only one of the two has: neither equal nor different
    allowed: Allowance
    chained: int
    steps: int

    @property
    def verdict(self) -> str:
        """'equal', 'different', or under another fingerprint 'within tolerance' or 'not covered'."""
        if self.equal == self.tensors and self.lines.all_equal:
            return "equal"
        if not self.fingerprint or self.lines.missing or self.allowed.beyond(self.distances):
            return "different"
        return "not covered" if self.not_covered else "within tolerance"

    @property
    def not_covered(self) -> Mapping[str, str]:
        """Kind -> why its distance neither confirms nor refutes the release, and what would."""
        return self.allowed.not_covered(self.distances)


@dataclass(frozen=True)
class Replayed:
    """A replayed link: its report, the state that it ended in, and the tensors that its chain began from."""

    report: LinkReport
    state: State
    origin: Mapping[str, Tensor]

    def leads_to(self, link: Link) -> bool:
        """Whether `link` goes on from this state rather than from the released one.

        Under another fingerprint it does: were each link judged from its released start, a forger could walk away by
        what is allowed at every link, or begin anew behind a link that is not covered.
        """
        return self.report.verdict in ("within tolerance", "not covered") and self.report.link.end == link.start


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
    sources: Sources,
    prepare: Prepare,
    tolerance: float | None = None,
    progress: Callable[[int], None] = lambda step: None,
    before: Replayed | None = None,
) -> Replayed:
    """Train `link` again from its starting state, and compare. The release must have been verified just before.

    tolerance: of weights and moments, instead of the measured table's. progress: called with the number of completed
    steps of the run after each step. before: the link before, as it was replayed, whose state this one goes on from if
    it leads to it.
    """
    released, manifest = checkpoint.load(folder / "checkpoints" / folder_name(link.stop_step), verified=True)
    start: State | None = None
    if link.start is not None:
        start, _ = checkpoint.load(folder / "checkpoints" / folder_name(link.first_step), verified=True)
    check_recorded_order(manifest)
    recipe = recorded_recipe(manifest["recipe"], str(folder / folder_name(link.stop_step))).recipe
    if start is None:
        origin: Mapping[str, Tensor] = {
            f"weights/{spec.name}": draw(spec, recipe.model, recipe.seed) for spec in recipe.parameters
        }
    else:
        origin = start.tensors
    chained, steps = 1, link.stop_step - link.first_step
    carried: tuple[tuple[str, Any, Any], ...] = ()
    if before is not None and before.leads_to(link):
        start, origin, carried = before.state, before.origin, before.report.fingerprint
        chained, steps = before.report.chained + 1, before.report.steps + steps
    state, fingerprint, measured = _train(
        verified.lineage, link, start, manifest["fingerprint"], sources, prepare, progress
    )
    found = [_compare(name, released.tensors[name], state.tensors[name]) for name in sorted(released.tensors)]
    lines = _compare_lines(folder, link, verified.release.links[-1].stop_step, measured)
    cursors = sources.training(recipe).cursors(link.stop_step)
    here = {name: cursor.model_dump(mode="json") for name, cursor in cursors.items()}
    if (told := manifest.get("sources")) is not None and told != here:
        lines.missing.append(f"step {link.stop_step}: how far its sources were read is {told}, and here {here}")
    differing, unrecorded = _fingerprints(manifest["fingerprint"], fingerprint)
    differing = (*differing, *(entry for entry in carried if entry not in differing))
    distances = dict(lines.distances)
    if any(found):
        distances = state_distances(origin, released.tensors, state.tensors) | distances
    chain = Chain(steps, movement(origin, state.tensors) if any(found) else 0.0)
    report = LinkReport(
        link,
        len(found),
        sum(difference is None for difference in found),
        tuple(difference for difference in found if difference is not None),
        lines,
        {kind: distance for kind, distance in distances.items() if distance},
        differing,
        unrecorded,
        allowance(recipe, fingerprint, rows_of(differing), chain, tolerance),
        chained,
        steps,
    )
    return Replayed(report, state, origin)


def _fingerprints(
    released: Mapping[str, Any], here: Mapping[str, Any]
) -> tuple[tuple[tuple[str, Any, Any], ...], tuple[str, ...]]:
    """The entries that differ, and the names of those that one of the two does not have.

    A record that is older than an entry does not say what it was: that allows nothing, and is told.
    """
    common = released.keys() & here.keys()
    differing = differences({key: released[key] for key in common}, {key: here[key] for key in common})
    return tuple((key, old, new) for key, old, new in differing), tuple(sorted(released.keys() ^ here.keys()))


# (kind, completed steps, set or "") -> what was measured there
_Lines = dict[tuple[str, int, str], dict[str, Any]]


def _train(
    line: Lineage,
    link: Link,
    start: State | None,
    wanted: Mapping[str, Any],
    sources: Sources,
    prepare: Prepare,
    progress: Callable[[int], None],
) -> tuple[State, dict[str, Any], _Lines]:
    """The state after the link, the fingerprint of its last piece, and what was measured.

    A link that the record trained in several segments (resumed, with changed keys perhaps) is trained in the same
    pieces.
    """
    state, step = start, link.first_step
    measured: _Lines = {}
    fingerprint: dict[str, Any] = {}
    while step < link.stop_step:
        try:
            segment = line.segment_at(step)
        except ValueError as error:
            raise ReleaseError(f"link {link.link}: {error}: nothing says how it was trained") from error
        stop = link.stop_step if segment.stop_step is None else min(segment.stop_step, link.stop_step)
        recipe = recorded_recipe(dict(segment.recipe), LEDGER).recipe
        due = plan_of(recipe, segment.first_step)
        evaluators: list[Evaluator] = [HeldOutLoss(sources.held_out(recipe)), *sources.scored(recipe)]
        every = recipe.log.evaluate_every_steps
        run = prepare(
            recipe, Plan(step, stop, log_every_steps=recipe.log.every_steps, evaluate_every_steps=every), wanted
        )
        try:
            if state is not None:
                run.import_state(state)
            if step == 0 and due.evaluate_at_start:
                _measure(evaluators, run, 0, measured)
            for result in run.train(sources.training(recipe)):
                completed = result.step + 1
                if due.wants_log(completed) or result.skipped:
                    measured["step", completed, ""] = _step_line(result)
                _measure([one for one in evaluators if one.is_due(due, completed)], run, completed, measured)
                progress(completed)
            snapshot = run.export_state()
            # the run is about to end
            state = replace(snapshot, tensors={name: snapshot.tensors[name] for name in snapshot.tensors})
            fingerprint = run.fingerprint().as_json()
        finally:
            run.close()
        step = stop
    assert state is not None
    return state, fingerprint, measured


def _step_line(result: StepResult) -> dict[str, Any]:
    """What a line of a step holds that does not depend on the machine's speed, under the same names."""
    return {
        "loss": float(result.loss),
        **{name: float(value) for name, value in result.measures.items()},
        "grad_norm": float(result.grad_norm),
        "learning_rate": dict(result.learning_rates),
        "bearing_tokens": result.bearing_tokens,
        "skipped": result.skipped,
    }


def _measure(evaluators: Sequence[Evaluator], run: Run, completed: int, into: _Lines) -> None:
    for record in (record for evaluator in evaluators for record in evaluator.measure(run, completed)):
        into[record["kind"], completed, record["set"]] = score_numbers(record)


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


def _compare_lines(folder: Path, link: Link, last_step: int, measured: _Lines) -> MeasuredLines:
    """The lines of the link in metrics.jsonl, with those before step 0 where it begins there.

    Scores that have a record are compared by `--scores`; those of datasets that are not here are left to the table. A
    run that was stopped amid its last evaluation lacks scores of that step.
    """
    lines = MeasuredLines()
    scored = {name for kind, _, name in measured if kind == "score"}
    for record in effective_records(folder, kinds=KINDS):
        if record["kind"] == SCORE and (RECORD in record or record["set"] not in scored):
            continue
        if link.first_step < record["step"] <= link.stop_step or (not record["step"] and not link.first_step):
            here = measured.pop((record["kind"], record["step"], record.get("set", "")), None)
            lines.compare(score_numbers(record), here)
    for kind, step, name in measured:
        if kind == SCORE and step == last_step:
            continue
        lines.missing.append(f"step {step}{f', {name}' if name else ''}: has no {kind} line in the release")
    return lines


# Claim -> the kind of lines that it is about, and what they are called. Of states and losses something is always shown.
_CLAIMS = {
    STATES: ("", ""),
    LOSSES: ("step", "lines"),
    HELD_OUT: ("evaluation", "lines"),
    DATASET_SCORES: (SCORE, "scores of datasets that are here"),
}


def covered(reports: Sequence[LinkReport], verified: Verified) -> list[Claim]:
    """The claims that these replays cover, or would have covered but for distances that say nothing."""
    judged = [report for report in reports if report.verdict != "different"]
    claims = []
    for name, (kind, called) in _CLAIMS.items():
        if judged and (name in (STATES, LOSSES) or any(report.lines.lines[kind] for report in judged)):
            claims.append(_claim(name, kind, called, judged, len(verified.release.links)))
    return claims


def _claim(name: str, kind: str, called: str, judged: Sequence[LinkReport], whole: int) -> Claim:
    """Over the links of which every distance that the claim is about says something; else why one says nothing."""
    open_links = [(report.link.link, why) for report in judged if (why := _uncovered(name, report)) is not None]
    good = [report for report in judged if _uncovered(name, report) is None]
    equal = sum(report.verdict == "equal" for report in good)
    how = f"{len(good)} of {whole} links" + ("" if equal == len(good) else f", {len(good) - equal} within tolerance")
    if called:
        how += f": {sum(report.lines.lines[kind] for report in good):,} {called}"
    if not open_links:
        return Claim(name, "replay", how)
    numbers = ", ".join(str(link) for link, _ in open_links[:3]) + (" .." if len(open_links) > 3 else "")
    left = f"link {numbers} not covered: {open_links[0][1]}"
    return Claim(name, "replay", f"{how}; {left}") if good else Claim(name, "not covered", left)


def _uncovered(name: str, report: LinkReport) -> str | None:
    """The first kind of number of this claim that says nothing in this link, and why."""
    for kind, why in report.not_covered.items():
        if kind in STATE_KINDS:
            claims: tuple[str, ...] = (STATES,)
        else:
            claims = (HELD_OUT, DATASET_SCORES) if kind.startswith("held-out ") else (LOSSES,)
        if name in claims:
            return f"{kind}: {why}"
    return None
