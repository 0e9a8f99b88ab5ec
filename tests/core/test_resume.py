"""How a run starts: what it goes on from, over the whole space of what a start can find, and what is refused."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.backends.null import BACKEND
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import CheckpointError, RunFolderError, WeftrainError
from weftrain.core.resume import Start, commit, decide
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import MetricsWriter
from weftrain.core.run.origin import Origin, OriginKind, find_origin
from weftrain.core.run.prepare import prepare_run
from weftrain.core.run.run_folder import open_run
from weftrain.core.run.situation import Situation, StoredFacts
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import fit

Tiny = Callable[..., Recipe]
FRESH, START_FROM, CHECKPOINT = OriginKind.FRESH, OriginKind.START_FROM, OriginKind.CHECKPOINT
STORED, COMPLETE, REFUSED = OriginKind.STORED_STATE, OriginKind.COMPLETE, OriginKind.REFUSED
LOST = ((4, "damaged"), (6, "missing"))


@pytest.mark.parametrize(
    ("situation", "kind", "step", "use"),
    [
        ({}, FRESH, 0, "replace"),
        ({"start_from": True}, START_FROM, 0, "replace"),
        ({"checkpoint": 4}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "start_from": True}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 0, "start_from": True}, CHECKPOINT, 0, "replace"),  # a run of chunks keeps what it started from
        ({"checkpoint": 4, "lost": LOST}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 8}, COMPLETE, 8, "replace"),
        ({"checkpoint": 9}, COMPLETE, 9, "replace"),
        ({"stored": StoredFacts(6, "current")}, STORED, 6, "continue"),
        ({"stored": StoredFacts(6, "current"), "start_from": True}, STORED, 6, "continue"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "current")}, STORED, 6, "continue"),
        ({"checkpoint": 4, "stored": StoredFacts(4, "current")}, STORED, 4, "continue"),
        ({"checkpoint": 4, "stored": StoredFacts(2, "current")}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(2, "behind")}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "behind")}, CHECKPOINT, 4, "set_aside"),
        ({"checkpoint": 4, "stored": StoredFacts(2, "left")}, CHECKPOINT, 4, "set_aside"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "current", volatile=True)}, STORED, 6, "continue"),
        ({"checkpoint": 4, "stored": StoredFacts(2, "current", volatile=True)}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "behind", volatile=True)}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "left", volatile=True)}, CHECKPOINT, 4, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(6, "foreign", volatile=True)}, CHECKPOINT, 4, "replace"),
        ({"stored": StoredFacts(2, "left"), "start_from": True}, START_FROM, 0, "set_aside"),
        ({"stored": StoredFacts(8, "current")}, COMPLETE, 8, "continue"),
        ({"stored": StoredFacts(8, "current", unfinished=True)}, STORED, 8, "continue"),
        ({"stored": StoredFacts(6, "current"), "lost": LOST}, STORED, 6, "continue"),
        ({"stored": StoredFacts(2, "foreign")}, REFUSED, 0, "replace"),
        ({"checkpoint": 4, "stored": StoredFacts(2, "foreign")}, REFUSED, 0, "replace"),
        ({"lost": LOST}, REFUSED, 0, "replace"),
        ({"lost": LOST, "start_from": True}, REFUSED, 0, "replace"),
        ({"lost": LOST, "from_scratch": True}, FRESH, 0, "replace"),
        ({"lost": LOST, "gave_up_lost": True}, FRESH, 0, "replace"),
        ({"checkpoint": 4, "from_scratch": True}, REFUSED, 0, "replace"),
        ({"stored": StoredFacts(6, "current"), "from_scratch": True}, REFUSED, 0, "replace"),
    ],
)
def test_what_a_start_goes_on_from(situation: dict[str, Any], kind: OriginKind, step: int, use: str) -> None:
    found = find_origin(Situation(8, **situation))
    assert (found.kind, found.step, found.stored_state) == (kind, step, use)
    assert bool(found.reason) == (kind is REFUSED)
    assert bool(found.said) == ("stored" in situation and kind is not REFUSED)


def situations() -> Iterator[Situation]:
    """Every combination: each fact takes each kind of value that it can have."""
    steps, flags = (None, 0, 2, 4, 8, 9), (False, True)
    owners = ("current", "behind", "left", "foreign")
    stored = [
        None,
        *(
            StoredFacts(step, owner, unfinished, volatile=volatile)
            for step, owner, unfinished, volatile in itertools.product((2, 4, 8), owners, flags, flags)
        ),
    ]
    for values in itertools.product(steps, ((), LOST), flags, stored, flags, flags):
        yield Situation(8, *values)


def test_over_all_situations_nothing_trained_is_lost_and_nothing_is_begun_again_unasked() -> None:
    kinds = set()
    for found in situations():
        origin = find_origin(found)
        kinds.add(origin.kind)
        if origin.kind is REFUSED:
            assert origin == Origin(REFUSED, reason=origin.reason)
            continue
        stored, checkpoint = found.stored, found.checkpoint
        assert stored is None or stored.volatile or stored.owner != "foreign"
        goes_on = origin.stored_state == "continue"
        assert goes_on == (stored is not None and stored.owner == "current" and stored.step >= (checkpoint or 0))
        assert origin.step == (stored.step if goes_on and stored is not None else checkpoint or 0)
        if (
            stored is not None and not stored.volatile and origin.stored_state == "replace"
        ):  # overwritten: only what is trained again, or known
            assert stored.step <= origin.step
            assert stored.owner != "left"
        if origin.kind in (FRESH, START_FROM):
            assert checkpoint is None
            assert origin.step == 0
            assert (origin.kind is START_FROM) == found.start_from
            assert not found.lost or found.from_scratch or found.gave_up_lost
        if origin.kind is COMPLETE:
            assert origin.step >= found.last_step
    assert kinds == set(OriginKind)


def start(folder: Path, recipe: Recipe, *allow: str, train: bool = True, **asked: bool) -> Start:
    """What `weftrain train` does with the null backend, up to the last step."""
    options = BACKEND.options()
    with open_run(folder, recipe.model_dump(mode="json")) as opened:
        found = decide(
            opened,
            recipe,
            training_source(recipe),
            BACKEND,
            options,
            folder.parent,
            allow=set(allow),
            say=lambda line: None,
            **asked,
        )
        if train and not found.complete:
            run = prepare_run(BACKEND, found.job(options))
            if found.state is not None:
                run.import_state(found.state)
            ledger = commit(found, {})
            speed = Speed(1.0, Peak(None, ""))
            with MetricsWriter(folder, resume_step=found.resumed_step, repaired=True) as metrics:
                place = (found.source, [], opened.checkpoints, metrics, ledger)
                list(fit(run, found.plan, found.recipe, *place, speed=speed, history=found.history))
            run.close()
    return found


@pytest.fixture
def trained(tmp_path: Path, tiny_recipe: Tiny) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path / "trained"
    start(folder, null_recipe(tiny_recipe, 4))
    return folder


def null_recipe(tiny_recipe: Tiny, steps: int, *overrides: str) -> Recipe:
    return tiny_recipe("crystal", 'backend.name="null"', "backend.options={}", f"schedule.steps={steps}", *overrides)


def drop_last_checkpoints(run: Path) -> None:
    (run / LEDGER).write_bytes(b"".join((run / LEDGER).read_bytes().splitlines(keepends=True)[:1]))


def add_foreign(run: Path) -> None:
    shutil.copytree(run.parent / "other" / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000006")


@pytest.mark.parametrize(
    ("change", "overrides", "allow", "kind"),
    [
        (None, (), (), CHECKPOINT),
        (None, ("schedule.steps=4",), (), COMPLETE),
        (None, ("optimizer.beta1=0.8",), (), "--allow optimizer.beta1"),
        (None, ("optimizer.beta1=0.8",), ("optimizer.beta1",), CHECKPOINT),
        (None, ("data.synthetic_rows=13",), ("data.synthetic_rows",), "was trained on dataset"),
        (None, ("data.synthetic_rows=13",), ("data.synthetic_rows", "data"), CHECKPOINT),
        (None, ("model.num_layers=3",), ("model.num_layers",), "does not fit the recipe's model"),
        (add_foreign, (), (), "is not a checkpoint that this run goes on from"),
        (drop_last_checkpoints, (), (), "it lost lines"),
        (lambda run: (run / LEDGER).unlink(), (), (), "holds checkpoints and no ledger.jsonl"),
        (lambda run: shutil.rmtree(run / "checkpoints"), (), (), "no whole checkpoint is left"),
    ],
)
def test_what_is_found_in_a_folder(
    change: Callable[[Path], object] | None,
    overrides: tuple[str, ...],
    allow: tuple[str, ...],
    kind: OriginKind | str,
    trained: Path,
    tiny_recipe: Tiny,
    tmp_path: Path,
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    if change is add_foreign:
        start(tmp_path / "other", null_recipe(tiny_recipe, 6))
    if change is not None:
        change(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    recipe = null_recipe(tiny_recipe, 6, *overrides)
    if isinstance(kind, str):
        with pytest.raises(WeftrainError, match=kind):
            start(run, recipe, "schedule.steps", *allow)
    else:
        assert start(run, recipe, "schedule.steps", *allow, train=False).origin.kind is kind
    assert before == {path: path.read_bytes() for path in before}  # whatever was decided, nothing is written


def test_a_run_goes_on_where_it_stood(trained: Path, tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    found = start(run, null_recipe(tiny_recipe, 6), "schedule.steps")
    assert (found.plan.start_step, found.plan.last_step, found.complete) == (4, 6, False)
    assert found.history.tokens_read == 4 * found.recipe.tokens_per_step
    assert start(run, null_recipe(tiny_recipe, 6)).complete


def test_a_run_that_another_process_holds_is_refused(trained: Path, tiny_recipe: Tiny) -> None:
    recipe = null_recipe(tiny_recipe, 4)
    with open_run(trained, recipe.model_dump(mode="json")), pytest.raises(RunFolderError, match="in use"):
        start(trained, recipe)


def test_start_from_needs_a_whole_checkpoint_of_the_other_run(trained: Path, tiny_recipe: Tiny) -> None:
    other = trained.parent / "follower"
    recipe = null_recipe(tiny_recipe, 4, f"start_from={{run: {trained.name}, state: all}}")
    assert start(other, recipe, train=False).origin.kind is START_FROM
    with pytest.raises(CheckpointError, match="no whole checkpoint, and start_from needs one"):
        start(other, null_recipe(tiny_recipe, 4, "start_from={run: nobody, state: all}"), train=False)
