"""Commands that continue a run: those that `train` prints work as printed, and a change of data is told with its
numbers.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.core.run.test_continuation import ancestor_of
from tests.core.test_data import VOCAB, S, make_dataset
from weftrain.core.config import Recipe
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.run_source import run_source

Weftrain = Callable[..., Result]
Train = Callable[..., Result]


@pytest.fixture
def train(weftrain: Weftrain, tmp_path: Path) -> Train:
    """crystal_demo on the null backend, in batches of 2 of the 2,000 rows of source 'a'."""
    make_dataset(tmp_path / "data" / "a", [2000])
    fixed = [
        *(
            "--backend",
            "null",
            "--runs",
            tmp_path / "runs",
            f"data.root={tmp_path / 'data'}",
            f"data.sequence_length={S}",
        ),
        *(f"model.vocab_size={VOCAB}", "model.num_layers=1", "batch.micro_batch_size=2", "batch.global_batch_size=2"),
        *(
            "model.hidden_size=48",
            "model.num_heads=3",
            "model.intermediate_size=70",
            "model.rotary_dim=4",
            "model.mup.base_hidden_size=16",
        ),
        *("log.evaluate_every_steps=0", "log.tensorboard=false", "checkpoint.every_steps=0"),
        "data.sources=[{name: a, path: a, weight: 1}]",
    ]
    return lambda *arguments: weftrain("train", "crystal_demo", *fixed, *arguments)


def printed(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    line = result.output.strip().splitlines()[-1].strip()
    program, verb, *words = shlex.split(line.partition("    (continue to step")[0])
    assert (program, verb) == ("weftrain", "train")
    return words


def rows_read(run: Path, steps: int) -> list[str]:
    recipe = Recipe.from_record(json.loads((run / "recipe.json").read_bytes()))
    source = run_source(recipe, lineage(read_ledger(run / LEDGER)))
    return [name for step in range(steps) for row in range(2) for name in source.at(step).sample_names(step, row, 1)]


def test_the_printed_command_continues_chunks_and_schedule_twice_over(
    train: Train, weftrain: Weftrain, tmp_path: Path
) -> None:
    schedule = "schedule.learning_rate=[{shape: linear, steps: 6, start: 0.1, end: 0.01}]"
    deferred = "data.skip=[{chunk: 1, action: defer, reason: spike}]"
    first = train("schedule.steps=6", "data.chunks=3", schedule, deferred)
    second = weftrain("train", *printed(first))
    third = weftrain("train", *printed(second))
    assert "'schedule.learning_rate.2={shape: constant, steps: 12, start: 0.01}'" in second.output
    assert third.exit_code == 0, third.output
    assert "recipe changed at step 12: data.chunks: 6 -> 12" in third.output
    rows = rows_read(tmp_path / "runs" / "crystal_demo", 24)
    assert len(set(rows)) == len(rows) == 48
    manifest: dict[str, Any] = read_checkpoint_manifest(
        tmp_path / "runs" / "crystal_demo" / "checkpoints" / "step_00000024"
    )
    assert manifest["sources"]["a"] == {
        "dataset_id": manifest["dataset_id"],
        "place": 48,
        "read": 48,
        "subsets": [[0.0, 1.0]],
        "turn": 0,
    }


def test_a_run_goes_on_with_the_dataset_that_its_own_grew_into(train: Train, tmp_path: Path) -> None:
    """The refusal names what to allow; then no row comes twice, and the checkpoint says of how many rows the pass
    began.
    """
    make_dataset(tmp_path / "data" / "grown", [2000, 30], parents=[ancestor_of(tmp_path / "data" / "a")])
    assert train("schedule.steps=4").exit_code == 0
    onward = ["schedule.steps=9", "data.sources.0.path=grown"]
    refused = train(*onward)
    assert refused.exit_code == 2
    flags = re.findall(r"--allow [a-z0-9_.]+", refused.output)
    assert "--allow data.sources.0.path" in flags
    grown = train(*onward, *shlex.split(" ".join(flags)))
    assert "source 'a' has grown by 30 rows: they come at the end of the pass under way" in grown.output
    assert (
        "source 'a' goes on after 8 samples: 2,022 rows are left of the pass under way, each comes once" in grown.output
    )
    rows = rows_read(tmp_path / "runs" / "crystal_demo", 9)
    assert len(set(rows)) == len(rows) == 18
    manifest = read_checkpoint_manifest(tmp_path / "runs" / "crystal_demo" / "checkpoints" / "step_00000009")
    assert (manifest["sources"]["a"]["place"], manifest["sources"]["a"]["rows"]) == (18, [2000])


def test_the_printed_command_keeps_an_override_that_takes_the_chunks_away(train: Train) -> None:
    assert "data.chunks=null" in printed(train("schedule.steps=4", "data.chunks=null"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("schedule.learning_rate=[{shape: linear, steps: 4, start: 0.1, end: 0}]",),
            "the learning rate ends at 0, so more steps need one",
        ),
        (
            ("data.sources=[{name: a, path: a, tokens: 64}]",),
            "tokens of all sources come to 8 samples, and 8 steps of 2 read 16",
        ),
    ],
)
def test_where_no_command_would_work_what_to_do_is_printed(train: Train, arguments: tuple[str, ...], told: str) -> None:
    result = train("schedule.steps=4", *arguments)
    assert result.exit_code == 0, result.output
    assert told in result.output.splitlines()[-1]
    assert "weftrain train" not in result.output.splitlines()[-1]


def test_another_batch_size_reads_on_in_the_same_stream(train: Train, weftrain: Weftrain, tmp_path: Path) -> None:
    train("schedule.steps=4")
    refused = train("schedule.steps=6", "batch.global_batch_size=6")
    assert "--allow batch.global_batch_size --allow schedule.steps" in refused.output
    result = train(
        "schedule.steps=6",
        "batch.global_batch_size=6",
        "--allow",
        "batch.global_batch_size",
        "--allow",
        "schedule.steps",
    )
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "crystal_demo"
    assert read_checkpoint_manifest(run / "checkpoints" / "step_00000006")["position"] == 4 * 2 + 2 * 6
    assert "step 5: samples 14..19" in weftrain("log", run, "--samples", "5").output
    assert "step 3: samples 6..7" in weftrain("log", run, "--samples", "3").output
    again = train("schedule.steps=6", "batch.global_batch_size=6")
    assert "is complete: 6 of 6 steps" in again.output


def test_a_schedule_that_is_too_short_is_refused_with_the_override_that_extends_it(train: Train) -> None:
    result = train("schedule.steps=9", "schedule.learning_rate=[{shape: constant, steps: 4, start: 0.1}]")
    assert (
        "covers 4 steps of 9: add a segment, e.g. with 'schedule.learning_rate.1={shape: constant, steps: 5, start: "
        "0.1}'" in result.output
    )
    more = "schedule.learning_rate.1={shape: constant, steps: 5, start: 0.1}"
    assert (
        train("schedule.steps=9", "schedule.learning_rate=[{shape: constant, steps: 4, start: 0.1}]", more).exit_code
        == 0
    )
