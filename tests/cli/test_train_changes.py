"""`weftrain train` with a plan of changes: one command goes through all of them, as stopping, editing and `--allow`
would.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from known_peak import PROGRAM
from written_datasets import VOCAB, S, make_dataset

from weftrain.backends.local import BACKEND as LOCAL
from weftrain.backends.local import LocalRun
from weftrain.core.backend import Job
from weftrain.core.config import Recipe
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.formats.fsops import remove_tree
from weftrain.core.formats.strict_yaml import dump_yaml
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import read_metrics

Train = Callable[..., Result]
FIXED = ("--backend", "null", "batch.micro_batch_size=2", "batch.global_batch_size=2")
PLAN = (
    "changes=[{step: 3, set: {batch.global_batch_size: 4}, reason: a ramp}, "
    "{step: 5, set: {batch.global_batch_size: 8, optimizer.weight_decay: 0.5}}]"
)


def recipe_lines(run: Path) -> list[tuple[int, list[Any]]]:
    entries = read_ledger(run / LEDGER)
    return [(entry["step"], [list(one) for one in entry["changes"]]) for entry in entries if entry["kind"] == "recipe"]


def without_plan(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "changes"}


def test_one_command_trains_through_its_changes_as_stops_edits_and_permissions_do(
    train_tiny: Train, weftrain: Train, tmp_path: Path
) -> None:
    told = train_tiny(*FIXED, "schedule.steps=8", PLAN, "--run", "planned")
    assert told.exit_code == 0, told.output
    assert "recipe changed at step 3: batch.global_batch_size: 2 -> 4" in told.output
    assert told.output.count("kernels  ") == 1
    for stop, size in ((3, 2), (5, 4), (8, 8)):
        late = ("optimizer.weight_decay=0.5", "--allow", "optimizer.weight_decay") if stop == 8 else ()
        allowed = ("--allow", "batch.global_batch_size", "--allow", "schedule.steps", *late)
        args = (f"schedule.steps={stop}", f"batch.global_batch_size={size}", "--run", "by_hand")
        assert (hand := train_tiny(*FIXED, *args, *allowed)).exit_code == 0, hand.output
    runs = [tmp_path / "runs" / name for name in ("planned", "by_hand")]
    recipes = [json.loads((run / "recipe.json").read_bytes()) for run in runs]
    assert recipes[0] == recipes[1]
    length = recipes[0]["data"]["sequence_length"]
    lines = [lineage(read_ledger(run / LEDGER)) for run in runs]
    assert [one.tokens_read(8) for one in lines] == [lines[0].tokens_read(8)] * 2
    steps = [[record for record in read_metrics(run) if record["kind"] == "step"] for run in runs]
    assert [one["tokens"] for one in steps[0]] == [one["tokens"] for one in steps[1]]
    assert steps[0][-1]["tokens"] == lines[0].tokens_read(8) == (3 * 2 + 2 * 4 + 3 * 8) * length
    told = weftrain("log", runs[0]).output
    assert "recipe changed  batch.global_batch_size: 2 -> 4, the data go on at sample 6: a ramp" in told
    planned = [entry for entry in read_ledger(runs[0] / LEDGER) if entry["kind"] == "recipe"]
    assert [entry.get("reason") for entry in planned] == ["a ramp", None]
    assert [change for change in planned[0]["changes"] if not change[0].startswith("data.continues")] == [
        ["batch.global_batch_size", 2, 4]
    ]
    assert [point.step for point in lines[0].checkpoints if point.step in (3, 5, 8)] == [3, 5, 8]


@pytest.mark.parametrize(
    ("plan", "prepared"),
    [
        (
            "changes=[{step: 2, set: {batch.global_batch_size: 8}}, {step: 4, set: {data.sequence_length: 7}}]",
            1,
        ),
        ("changes=[{step: 3, set: {optimizer.beta2: 0.9}}]", 2),
        ("changes=[{step: 3, set: {batch.global_batch_size: 2}}]", 2),  # from two micro-batches to one
    ],
)
def test_a_run_that_stays_prepared_through_a_change_computes_as_one_prepared_anew(
    plan: str, prepared: int, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Job] = []
    prepare = LOCAL.prepare

    def counted(job: Job) -> Any:
        made.append(job)
        return prepare(job)

    monkeypatch.setattr(LOCAL, "prepare", counted)
    shape = ("batch.micro_batch_size=2", "batch.global_batch_size=4", "schedule.steps=6", "log.every_steps=1", plan)
    assert (told := train_tiny(*shape, "--run", "kept")).exit_code == 0, told.output
    assert len(made) == prepared
    monkeypatch.setattr(LocalRun, "go_on", lambda run, job: False)
    assert (told := train_tiny(*shape, "--run", "anew")).exit_code == 0, told.output
    runs = [tmp_path / "runs" / name for name in ("kept", "anew")]
    manifests = [read_checkpoint_manifest(run / "checkpoints" / "step_00000006") for run in runs]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    for key in ("recipe", "fingerprint", "tokens", "sources", "optimizer_updates"):
        assert manifests[0][key] == manifests[1][key], key
    losses = [[one["loss"] for one in read_metrics(run) if one["kind"] == "step"] for run in runs]
    assert losses[0] == losses[1]
    kinds = [[(entry["kind"], entry["step"]) for entry in read_ledger(run / LEDGER)] for run in runs]
    assert kinds[0] == kinds[1]


def test_a_resume_between_changes_goes_on_by_the_plan_and_an_edited_plan_is_asked_for(
    weftrain: Train, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def train(plan: str, *words: str) -> Result:
        shape = ("schedule.steps=8", 'backend={name: "null"}', "batch.global_batch_size=2", "batch.micro_batch_size=2")
        recipe = tiny_recipe("crystal", *shape, "checkpoint.every_steps=1", plan)
        (tmp_path / "a.yaml").write_text(dump_yaml(recipe.model_dump(mode="json")))
        return weftrain("train", tmp_path / "a.yaml", "--runs", tmp_path / "runs", *words)

    run = tmp_path / "runs" / "crystal_demo"
    assert train(PLAN).exit_code == 0
    for step in (6, 7, 8):  # as if the process had been killed after step 5, where the second change is due
        remove_tree(run / "checkpoints" / f"step_{step:08d}")
    late = PLAN.replace("step: 5", "step: 7")
    refused = train(late)
    assert refused.exit_code == 2
    assert "optimizer.weight_decay: 0.5 -> 0.1" in refused.output
    flags = shlex.split(" ".join(re.findall(r"--allow [a-z0-9_.]+", refused.output)))
    assert (again := train(late, *flags)).exit_code == 0, again.output
    assert "recipe changed at step 7: batch.global_batch_size: 4 -> 8" in again.output
    assert lineage(read_ledger(run / LEDGER)).tokens_read(8) == (3 * 2 + 4 * 4 + 1 * 8) * 13


def test_the_printed_command_continues_a_run_whose_changes_are_made(train_tiny: Train, weftrain: Train) -> None:
    first = train_tiny(*FIXED, "schedule.steps=8", PLAN)
    line = first.output.strip().splitlines()[-1].strip()
    words = shlex.split(line.partition("    (continue to step")[0])[2:]
    assert "--allow" in words
    assert "changes" not in words[words.index("--allow") :]
    onward = weftrain("train", *words)
    assert onward.exit_code == 0, onward.output


def test_a_run_that_goes_back_before_a_change_makes_it_again_at_its_step(
    train_tiny: Train, weftrain: Train, tmp_path: Path
) -> None:
    """Also where it goes on with its own recipe, which has the change made already."""
    run = tmp_path / "runs" / "crystal_demo"
    assert train_tiny(*FIXED, "schedule.steps=8", PLAN, "checkpoint.every_steps=2").exit_code == 0
    assert weftrain("rollback", run, "--to", "2", "--reason", "a spike").exit_code == 0
    shape = (*FIXED, "schedule.steps=8", "checkpoint.every_steps=2")
    again = weftrain("train", "crystal_demo", "--runs", tmp_path / "runs")
    assert again.exit_code == 0, again.output
    assert "recipe changed at step 2: batch.global_batch_size: 8 -> 2" in again.output
    assert "recipe changed at step 5: optimizer.weight_decay: 0.1 -> 0.5" in again.output
    assert lineage(read_ledger(run / LEDGER)).tokens_read(8) == (3 * 2 + 2 * 4 + 3 * 8) * 13
    assert train_tiny(*shape, PLAN).exit_code == 0  # it is complete, and the command that made it says so


def test_show_and_the_start_say_what_each_part_of_the_run_reads(weftrain: Train) -> None:
    shown = weftrain(
        "show", "crystal_demo", "batch.micro_batch_size=2", "batch.global_batch_size=2", "schedule.steps=8", PLAN
    )
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert "steps        0..2: 2 sequences x 256 tokens" in lines
    assert "steps        3..4: 4 sequences x 256 tokens" in lines
    assert "steps        5..7: 8 sequences x 256 tokens" in lines
    assert any(line.startswith("tokens       9,728 in 8 steps, which change 2 times") for line in lines)


def test_a_change_whose_options_do_not_hold_is_refused_before_step_0(train_tiny: Train, tmp_path: Path) -> None:
    plan = "changes=[{step: 3, set: {backend.options.colour: red}}]"
    refused = train_tiny("schedule.steps=8", plan)
    assert refused.exit_code == 2
    assert "unknown key 'colour'" in refused.output
    assert not (tmp_path / "runs").exists()


def test_data_of_a_later_change_may_come_while_the_run_trains(train_tiny: Train, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data" / "a", [100])
    data = (f"data.root={tmp_path / 'data'}", "data.synthetic_rows=null", f"data.sequence_length={S}")
    shape = (*FIXED, *data, f"model.vocab_size={VOCAB}", "model.num_layers=1", "schedule.steps=6")
    plan = "changes=[{step: 3, set: {data.sources: [{name: b, path: b, weight: 1}]}}]"
    sources = "data.sources=[{name: a, path: a, weight: 1}]"
    early = train_tiny(*shape, sources, plan)
    assert "warning: the recipe changes at step 3, and its data are not there yet" in early.output
    assert early.exit_code != 0  # it stops at the change, saved
    make_dataset(tmp_path / "data" / "b", [50], first_id=20_000)
    later = train_tiny(*shape, sources, plan)
    assert later.exit_code == 0, later.output
    assert "source 'b' is new: it begins at its first row" in later.output


def test_a_run_branches_from_a_named_step_of_another(train_tiny: Train, tmp_path: Path) -> None:
    """A stable rate once, and decays from several of its steps."""
    stable = "schedule.learning_rate=[{shape: constant, steps: 100, start: 0.1}]"
    assert train_tiny(*FIXED, "schedule.steps=6", stable, "checkpoint.every_steps=2", "--run", "stable").exit_code == 0
    decay = "schedule.learning_rate=[{shape: one_minus_sqrt, steps: 3, start: 0.1, end: 0.0}]"
    for step in (2, 4):
        start = f"start_from={{run: stable, step: {step}, state: all}}"
        told = train_tiny(*FIXED, "schedule.steps=3", decay, start, "--run", f"decay-{step}")
        assert told.exit_code == 0, told.output
        ledgers = [lineage(read_ledger(tmp_path / "runs" / name / LEDGER)) for name in ("stable", f"decay-{step}")]
        roots = {point.step: point.root for point in ledgers[0].checkpoints}
        assert ledgers[1].segments[0].parent == roots[step]


@pytest.mark.prove
@pytest.mark.parametrize("backend", ["local", "streaming"])
def test_the_state_after_planned_changes_is_bit_for_bit_that_of_stops_and_edits(
    backend: str, train_tiny: Train, tmp_path: Path
) -> None:
    """streaming: with a store on disk, which goes on through the changes."""
    options = "{threads: 1, tier: mapped}" if backend == "streaming" else "{threads: 1}"
    fixed = (f"backend={{name: {backend}, options: {options}}}", *FIXED[2:], "batch.micro_batch_size=1")
    assert (told := train_tiny(*fixed, "schedule.steps=6", PLAN, "--run", "planned")).exit_code == 0, told.output
    if backend == "streaming":
        assert "own state in" in told.output
    for stop, size in ((3, 2), (5, 4), (6, 8)):
        late = ("optimizer.weight_decay=0.5", "--allow", "optimizer.weight_decay") if stop == 6 else ()
        allowed = ("--allow", "batch.global_batch_size", "--allow", "schedule.steps", *late)
        args = (f"schedule.steps={stop}", f"batch.global_batch_size={size}", "--run", "by_hand")
        assert train_tiny(*fixed, *args, *allowed).exit_code == 0
    runs = [tmp_path / "runs" / name / "checkpoints" / "step_00000006" for name in ("planned", "by_hand")]
    tensors = [read_checkpoint_manifest(run)["tensors"] for run in runs]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("backend.options.tier=mapped",), "at step 3 the store on disk would be another one (accumulated)"),
        (("backend.options.open_to_replicas=true",), "replicas leave a run where its recipe changes"),
    ],
)
def test_weight_streaming_refuses_what_it_cannot_go_on_through_before_step_0(
    words: tuple[str, ...], told: str, train_tiny: Train, tmp_path: Path
) -> None:
    refused = train_tiny("--backend", "streaming", *FIXED[2:], "schedule.steps=6", PLAN, *words)
    assert refused.exit_code == 2
    assert told in refused.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.prove
def test_ranks_go_through_changes_in_one_command(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_overrides, "backend={name: cuda, options: {device: cpu, threads: 1}}", "batch.replicas=2"]
    batch = ["batch.micro_batch_size=1", "batch.global_batch_size=2", "schedule.steps=6", PLAN]
    command = ["--standalone", "--nproc-per-node=2", *PROGRAM[1:], "train", "crystal_demo", *overrides, *batch]
    program = [sys.executable, "-m", "torch.distributed.run", *command, "--runs", str(tmp_path / "runs")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recipe changed at step 5: batch.global_batch_size: 4 -> 8" in done.stdout
    run = tmp_path / "runs" / "crystal_demo"
    assert lineage(read_ledger(run / LEDGER)).tokens_read(6) == (3 * 2 + 2 * 4 + 1 * 8) * 13
