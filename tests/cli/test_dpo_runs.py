"""DPO from end to end by commands: pairs are prepared, a reference stored, a run killed and resumed, its bits replayed
from a release, and everything that reads a run tells the measures of pairs in place of a perplexity.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from known_peak import PROGRAM
from preference_runs import DPO, START, command, do, make, succeed, train

from weftrain.analysis.evaluation.records import FOLDER, read_records
from weftrain.core import checkpoint
from weftrain.core.objectives_section import DpoObjective
from weftrain.core.run.metrics import read_metrics

MEASURES = DpoObjective.measures
LONG = ["schedule.steps=40", "checkpoint.every_steps=10", "checkpoint.keep=null", "log.evaluate_every_steps=20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As preference_runs.make, and runs/dpo of 40 steps."""
    return make(tmp_path_factory.mktemp("dpo"), {"dpo": LONG})


def newest(made: Path, run: str) -> Path:
    found = checkpoint.newest(made / "runs" / run / "checkpoints", print)
    assert found is not None
    return found


def evaluated(run: Path) -> dict[str, Any]:
    (found,) = (json.loads(line) for line in succeed("eval", run, "--json").splitlines() if line[0] == "{")
    return dict(found)


def assert_same_run(made: Path, run: str, other: str) -> None:
    """The same bits of every tensor, loss and measure."""
    one, two = (checkpoint.load(newest(made, name))[0] for name in (run, other))
    assert one.step == two.step
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    keys = ("kind", "step", "loss", "grad_norm", *MEASURES)
    lines = [
        [{key: line.get(key) for key in keys} for line in read_metrics(made / "runs" / name)] for name in (run, other)
    ]
    kinds = ("step", "evaluation")
    assert [line for line in lines[0] if line["kind"] in kinds] == [line for line in lines[1] if line["kind"] in kinds]


@pytest.mark.prove
def test_a_killed_run_goes_on_with_the_same_bits(made: Path) -> None:
    words = [str(word) for word in command(made, "killed", "pairs", *DPO, START, *LONG)]
    process = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (made / "runs/killed/checkpoints/step_00000010/manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: give it more steps"
    succeed(*words)
    assert_same_run(made, "killed", "dpo")


@pytest.mark.prove
def test_streaming_has_the_bits_of_local_and_its_release_is_replayed(made: Path) -> None:
    succeed(*command(made, "streamed", "pairs", *DPO, START, *LONG, "backend.name=streaming"))
    assert_same_run(made, "streamed", "dpo")
    for run in ("dpo", "streamed"):
        target = made / f"release of {run}"
        succeed("release", made / "runs" / run, "--to", target, "--licence", "Apache-2.0")
        succeed("verify", target)
        (line,) = (line for line in succeed("replay", target, "--link", "1").splitlines() if "10 of 10" in line)
        assert line.split()[-1] == "equal"


@pytest.mark.prove
def test_two_ranks_train_what_one_process_does(made: Path) -> None:
    words = command(made, "both", "pairs", *DPO, START, "--backend", "cuda", "backend.options.device=cpu")
    batch = ["batch.replicas=2", "batch.micro_batch_size=2"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PROGRAM[1:]]
    named = ["name=both" if word == "both" else word for word in words if word != "--run"]  # torchrun has --run-path
    found = subprocess.run(
        [sys.executable, *launch, *map(str, named), *batch],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr + found.stdout
    train(made, "one", "pairs", *DPO, START)
    lines = [[line for line in read_metrics(made / "runs" / run) if line["kind"] == "step"] for run in ("both", "one")]
    assert len(lines[0]) == 4
    for both, one in zip(*lines, strict=True):
        for key in ("loss", *MEASURES):
            assert both[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5)
    target = made / "release of both"
    succeed("release", made / "runs/both", "--to", target, "--licence", "Apache-2.0")
    succeed("verify", target)
    scores = [evaluated(made / "runs" / run) for run in ("both", "one")]
    assert scores[0]["reward_margin"] == pytest.approx(scores[1]["reward_margin"], rel=1e-3)


@pytest.mark.prove
def test_what_reads_a_run_tells_the_measures_of_pairs(made: Path, tmp_path: Path) -> None:
    run = made / "runs" / "dpo"
    logged = [line for line in read_metrics(run) if line["kind"] == "evaluation"][-1]
    score = evaluated(run)
    assert "perplexity" not in score
    for key in ("loss", *MEASURES):
        assert score[key] == pytest.approx(logged[key], rel=1e-5)
    shown = " ".join(succeed("eval", run).split())
    assert "reward" in shown
    assert "perplexity" not in shown

    succeed("eval", run, "--watch", "--batch-size", "6")
    records = [record for record in read_records(run / FOLDER) if record["step"] == 40]
    assert records[0]["metrics"].keys() == {"loss", *MEASURES}
    for key in ("loss", *MEASURES):
        assert records[0]["metrics"][key]["value"] == pytest.approx(logged[key], rel=1e-5)
    odd = do("eval", run, "--watch", "--batch-size", "3")
    assert odd.exit_code == 2
    assert "reads pairs of rows" in odd.output

    compared = json.loads(succeed("compare", run, made / "runs" / "sft", "--json"))
    kinds = {(column["kind"], column["measure"]) for column in compared["columns"] if column["kind"] == "preference"}
    assert kinds == {("preference", name) for name in ("loss", *MEASURES)}
    assert "train losses are of different objectives: dpo dpo, sft next_token" in compared["notes"]
    drawn = succeed("figures", run, "--output", tmp_path / "figures", "--format", "svg")
    assert "no held-out loss is recorded" in drawn
    succeed("report", run)
    page = (run / "report.html").read_text()
    assert "reward margin" in page or "reward_margin" in page
    pairs = do("compare", run, "--to", tmp_path / "compared", "--loss-on", made / "datasets" / "pairs")
    assert pairs.exit_code == 2
    assert "holds preference pairs" in pairs.output


@pytest.mark.prove
def test_an_evaluation_of_the_recipe_measures_pairs_too(made: Path) -> None:
    evaluations = "evaluations=[{name: again, every_steps: 4, datasets: [pairs], limit: 4}]"
    train(made, "evaluated", "pairs", *DPO, START, evaluations)
    (line,) = (line for line in read_metrics(made / "runs/evaluated") if line["kind"] == "score")
    assert line["metrics"].keys() == {"loss", *MEASURES}
    assert line["samples"] == 8
