"""Random histories of changes, planned and made by hand, trained by `decide`, `commit` and `fit`: every token of a pass
is read once until the pass is complete, and what the record counts is what was read.

The model of it here knows tokens alone: the datasets' tokens count up, so each says which source and row it is of.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.run.test_continuation import ancestor_of
from tests.core.written_datasets import VOCAB, S, make_dataset
from weftrain.backends.null import BACKEND
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.recipe_file import load_recipe
from weftrain.core.resume import Start, commit, decide
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import MetricsWriter, effective_records
from weftrain.core.run.prepare import prepare_run
from weftrain.core.run.run_folder import differences, follows, open_run
from weftrain.core.run.run_source import run_source
from weftrain.core.run.speed import Peak, Speed
from weftrain.core.trainer import fit

STEPS = 40
ROWS = {"a": 53, "b": 31, "grown": 71}
FIRST_ID = {"a": 0, "b": 20_000, "grown": 0}
RANGES = ([3, 5], [20, 31], [48, 53])
LENGTHS = {8: (4, 8), 4: (4, 8), 2: (4, 8)}  # sequence length -> batch sizes of whole rows


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("histories") / "datasets"
    make_dataset(folder / "a", [ROWS["a"]])
    make_dataset(folder / "b", [ROWS["b"]], first_id=FIRST_ID["b"])
    make_dataset(folder / "grown", [53, 18], parents=[ancestor_of(folder / "a")])
    return folder


@dataclasses.dataclass
class Reader:
    """What was read of one source in the pass under way, as token numbers of its dataset."""

    seen: set[int] = dataclasses.field(default_factory=set)

    def read(self, tokens: list[int], allowed: set[int]) -> None:
        for token in tokens:
            assert token in allowed, "a row that the recipe leaves out"
            if token in self.seen:
                assert not allowed - self.seen, "a pass that leaves rows out, or reads one twice"
                self.seen = set()
            self.seen.add(token)


def changes(draw: random.Random) -> list[dict[str, Any]]:
    """Changes one after the other, each as a plan would set it."""
    length, skipped, path, found = 8, 0, "a", []
    for step in sorted(draw.sample(range(1, STEPS), draw.randint(1, 4))):
        kind = draw.choice(("batch", "weights", "skip", "length", "grow"))
        value: dict[str, Any] = {}
        if kind == "weights":
            weight = draw.choice((0.25, 0.5, 0.75))
            value = {"data.sources.0.weight": weight, "data.sources.1.weight": 1 - weight}
        elif kind == "skip" and skipped < len(RANGES):
            value = {f"data.skip.{skipped}": {"source": "a", "rows": RANGES[skipped], "reason": "noise"}}
            skipped += 1
        elif kind == "grow" and path == "a":
            path, value = "grown", {"data.sources.0.path": "grown"}
        elif kind == "length":
            length = draw.choice(sorted(LENGTHS))
            value = {"data.sequence_length": length}
        value["batch.global_batch_size"] = draw.choice(LENGTHS[length])
        value["batch.micro_batch_size"] = draw.choice((1, 2, 4))
        found.append({"step": step, "set": value})
    return found


def base(root: Path, planned: list[dict[str, Any]]) -> Recipe:
    tree = load_recipe("crystal_demo").recipe.model_dump(mode="json")
    tree["model"] |= {"vocab_size": VOCAB, "num_layers": 1, "hidden_size": 4, "num_heads": 2, "intermediate_size": 4}
    tree["model"] |= {"rotary_dim": 2, "mup": tree["model"]["mup"] | {"base_hidden_size": 4}}
    sources = [{"name": name, "path": name, "weight": 0.5} for name in ("a", "b")]
    tree["data"] = {"root": str(root), "sequence_length": S, "row_length": S, "shuffle_seed": 1, "sources": sources}
    tree["batch"] = {"global_batch_size": 4, "micro_batch_size": 4}
    tree["schedule"]["steps"] = STEPS
    tree["backend"] = {"name": "null"}
    tree["checkpoint"] = {"every_steps": 0}
    tree["log"] = {"every_steps": 1, "evaluate_every_steps": 0, "tensorboard": False}
    return Recipe.model_validate(tree | {"changes": planned})


def train(folder: Path, recipe: Recipe, stop_after: int, allow: set[str] = frozenset()) -> tuple[Start, int]:  # type: ignore[assignment]
    """One start of `weftrain train` with the null backend, stopped and saved after `stop_after` completed steps."""
    options = BACKEND.options()
    with open_run(folder, recipe.model_dump(mode="json")) as opened:
        source = training_source(recipe)
        start = decide(opened, recipe, source, BACKEND, options, folder.parent, allow=allow, say=lambda line: None)
        completed = [start.plan.start_step]
        run = prepare_run(BACKEND, start.job(options))
        if start.state is not None:
            run.import_state(start.state)
        ledger = commit(start, {})
        with MetricsWriter(folder, resume_step=start.resumed_step, repaired=True) as metrics:
            place = (start.source, [], opened.checkpoints, metrics, ledger)
            for step in fit(
                run,
                start.plan,
                start.recipe,
                *place,
                speed=Speed(1.0, Peak(None, "")),
                history=start.history,
                should_stop=lambda: completed[-1] + 1 >= stop_after,
            ):
                completed.append(step.result.step + 1)
        run.close()
    return start, completed[-1]


def history(root: Path, run: Path, made: list[dict[str, Any]], by_hand: set[int], moves: set[int]) -> Iterator[Start]:
    """Train a run through the changes, those whose number is in by_hand by an edited recipe; starts between moves end
    a process, and those in `moves` go on in a copy of the datasets.
    """
    planned = [change for number, change in enumerate(made) if number not in by_hand]
    edits = {change["step"]: change for number, change in enumerate(made) if number in by_hand}
    recipe, done, allow = base(root, planned), 0, set[str]()
    while done < STEPS:
        stop = min([step for step in (*edits, *moves, STEPS) if step > done])
        start, done = train(run, recipe, stop, allow)
        yield start
        before, allow = recipe.at(done), set()
        if done in moves and not (moved := root.parent / f"moved-{done}").exists():
            shutil.copytree(root, moved)
        if done in moves:
            recipe, allow = edited(recipe, {"data.root": str(root.parent / f"moved-{done}")}), {"data.root"}
        if done in edits:
            recipe = edited(recipe.at(done), edits[done]["set"])
            trees = [one.at(done).model_dump(mode="json") for one in (before, recipe)]
            allow |= {"data", *(key for key, _, _ in differences(*trees) if not follows(key))}


def edited(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump(mode="json")
    for key, value in values.items():
        place = tree
        *parents, last = key.split(".")
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if isinstance(place, list):
            place[int(last) : int(last) + 1] = [value]
        else:
            place[last] = value
    return Recipe.model_validate(json.loads(json.dumps(tree)))


def check(root: Path, run: Path, made: list[dict[str, Any]], by_hand: set[int], moves: set[int]) -> None:
    readers, rows, tokens, step = {"a": Reader(), "b": Reader()}, Counter[str](), 0, 0
    state = edited(base(root, []), {"batch.global_batch_size": 4})  # the model's own recipe, changed step by step
    due = {change["step"]: change["set"] for change in made}
    for start in history(root, run, made, by_hand, moves):
        last = lineage(read_ledger(run / LEDGER)).checkpoints[-1].step
        while step < last:
            state = edited(state, due.get(step, {}))
            size, length = state.batch.global_batch_size, state.data.sequence_length
            ids = start.source.rows(step, 0, size).ids
            assert ids.shape == (size, length + 1)
            assert (np.diff(ids, axis=1) == 1).all()
            for name in readers:
                skipped = {
                    row for rule in state.data.skip if rule.source == name and rule.rows for row in range(*rule.rows)
                }
                path = next(one.path for one in state.data.sources if one.name == name)
                first = FIRST_ID[path]
                allowed = {first + row * S + at for row in range(ROWS[path]) if row not in skipped for at in range(S)}
                of = ids[(ids[:, 0] >= FIRST_ID["b"]) == (name == "b"), :-1]
                rows[name] += of.size // S
                readers[name].read(of.ravel().tolist(), allowed)
            tokens, step = tokens + size * length, step + 1
    ledger = lineage(read_ledger(run / LEDGER))
    records = [record for record in effective_records(run) if record["kind"] == "step"]
    assert records[-1]["tokens"] == ledger.tokens_read(STEPS) == tokens
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    newest = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_bytes())
    assert newest["tokens"] == tokens
    assert {name: cursor["read"] for name, cursor in newest["sources"].items()} == dict(rows)
    whole = run_source(Recipe.from_record(newest["recipe"]), ledger)
    for step in range(0, STEPS, 7):  # the record alone says of any step what it read
        assert whole.at(step).rows(step, 0, 1).ids.shape[1] - 1 in LENGTHS


@pytest.mark.parametrize(
    "seed", [88, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(100) if seed != 88)]
)
def test_a_history_of_changes_reads_every_row_of_a_pass_once(datasets: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    made = changes(draw)
    by_hand, moves = (set(draw.sample(range(4), draw.randint(0, 2))), set(draw.sample(range(1, STEPS), 2)))
    skips = {number for number, change in enumerate(made) if any("skip" in key for key in change["set"])}
    if skips & by_hand:  # the entries of data.skip are added one after the other
        by_hand |= skips
    check(datasets, tmp_path / "runs" / "run", made, by_hand, moves)
