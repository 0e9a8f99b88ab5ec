"""MLflow by its REST API: what a server has after resumes, outages and refusals. The quick tests have a stand-in; the
proof has a real server with SQLite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_stand_in import StandIn, stand_in
from small_metrics import train

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.mlflow import MLflow
from weftrain.analysis.tracking.tracker import TrackerError
from weftrain.core.run.metrics import MetricsWriter

SECRET = "s3cr3t-token"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as kept:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", kept.address)
        for name in ("TOKEN", "USERNAME", "PASSWORD"):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        yield kept


def follow(folder: Path) -> None:
    follower = Follower(folder, "mlflow", MLflow())
    try:
        follower.advance()
    finally:
        follower.close()


def test_a_run_is_there_with_its_recipe_and_goes_on_after_a_resume(server: StandIn, tmp_path: Path) -> None:
    prompts = {"log": {"sample_prompts": ["b", "a"]}}
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "x", "optimizer": {"beta1": 0.9}, **prompts}))
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 9)
        writer.step({"step": 10, "loss": math.nan})
        writer.samples([{"step": 10, "prompt": "a", "text": " word"}])
        follow(tmp_path)
        (run,) = server.runs.values()
        assert run["status"] == "KILLED"
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        train(writer, 7, 12)
        writer.event("end", step=12)
    follow(tmp_path)
    assert list(server.runs) == [f"{1:032x}"]
    assert run["name"] == tmp_path.name
    assert (run["params"]["optimizer.beta1"], run["params"]["log.sample_prompts"]) == ("0.9", '["b","a"]')
    assert server.series(1, "train/loss") == [
        *((step, 10 / step) for step in range(1, 10)), (10, "NaN"), (11, 10 / 11), (12, 10 / 12)
    ]  # fmt: skip
    assert server.series(1, "heldout/held/perplexity") == [(4, "Infinity"), (8, "Infinity"), (12, "Infinity")]
    assert run["tags"]["samples/2"] == "a word"
    assert run["tags"]["mlflow.note.content"] == "- goes on from step 6\n- ended after step 12"
    assert run["status"] == "FINISHED"


def test_what_a_killed_follower_sent_after_its_state_is_there_once(server: StandIn, tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
        follow(tmp_path)
        state = (tmp_path / "tracking" / "mlflow.json").read_bytes()
        train(writer, 4, 5)
        writer.event("checkpoint", step=5, root="ab" * 32)
        follow(tmp_path)
    (tmp_path / "tracking" / "mlflow.json").write_bytes(state)
    follow(tmp_path)
    assert [step for step, _ in server.series(1, "train/loss")] == [1, 2, 3, 4, 5]
    (run,) = server.runs.values()
    assert run["tags"]["mlflow.note.content"] == "- checkpoint of step 5, root abababababab"


def test_an_outage_leaves_no_gap(server: StandIn, tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
    follower = Follower(tmp_path, "mlflow", MLflow())
    follower.advance()
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        train(writer, 4, 6)
    server.failing = 503
    with pytest.raises(TrackerError, match=r"runs/log-batch: 503 .*check the server"):
        follower.advance()
    server.failing = 0
    follower.advance()
    follower.close()
    assert [step for step, _ in server.series(1, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_refusals_say_what_to_do_and_hold_no_secret(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    server.failing = 401
    with pytest.raises(TrackerError, match=r"refuses the credentials \(401\): set MLFLOW_TRACKING_TOKEN") as refused:
        follow(tmp_path)
    assert SECRET not in str(refused.value)
    assert server.asked[-1] == f"Bearer {SECRET}"
    server.failing = 0
    with_password = server.address.replace("//", f"//user:{SECRET}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    follow(tmp_path)
    assert str(server.asked[-1]).startswith("Basic ")
    server.runs.clear()
    with pytest.raises(TrackerError, match=r"no such run: .*delete tracking/mlflow\.json") as gone:
        follow(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password.rpartition(":")[0] + ":9")
    with pytest.raises(TrackerError, match=r"does not answer: .*: check the network") as nobody:
        follow(tmp_path)
    assert SECRET not in str(gone.value) + str(nobody.value)
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_missing_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI is not set" in MLflow().problem()
    for address in ("sqlite:///mlflow.db", "databricks", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "is not the address of a server" in MLflow().problem()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert MLflow().problem() == ""
