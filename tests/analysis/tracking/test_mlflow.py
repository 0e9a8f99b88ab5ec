"""MLflow by its REST API: what a server has after resumes, outages and refusals. The quick tests have a stand-in; the
proof has a real server with SQLite.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_stand_in import StandIn, stand_in
from small_metrics import train

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.mlflow import MLflow, _Server
from weftrain.analysis.tracking.tracker import TrackerError
from weftrain.core.run.metrics import MetricsWriter, read_metrics

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
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        train(writer, 4, 6)
    follow(tmp_path)
    assert [step for step, _ in server.series(1, "train/loss")] == [1, 2, 3, 4, 5, 6]
    (run,) = server.runs.values()
    assert run["tags"]["mlflow.note.content"] == "- checkpoint of step 5, root abababababab\n- goes on from step 3"


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
    said = str(gone.value) + str(nobody.value)
    assert SECRET not in said
    assert str(server.asked[-1]) not in said  # as it is sent
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_missing_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI is not set" in MLflow().problem()
    for address in ("sqlite:///mlflow.db", "databricks", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "is not the address of a server" in MLflow().problem()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert MLflow().problem() == ""


SERVE = """
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an MLflow server with SQLite, from packages that are installed for it alone."""
    site, needs = tmp_path / "site", Path(__file__).with_name("mlflow_server.txt")
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
        "--target",
        str(site),
        "-r",
        str(needs),
    ]
    made = subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the server's packages cannot be installed: {made.stderr.strip().splitlines()[-1]}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(tmp_path / "artifacts"),
    }
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.mark.prove
@pytest.mark.timeout(300)
def test_a_real_server_with_sqlite_has_the_run_once_after_a_resume_a_kill_and_a_rollback(
    real_server: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"name": "x", "optimizer": {"beta1": 0.9}}))

    def history(run_id: str, key: str) -> list[tuple[int, float]]:
        found = _Server(real_server).get("metrics/get-history", run_id=run_id, metric_key=key, max_results="1000")
        return sorted((int(one["step"]), float(one["value"])) for one in found["metrics"])

    def state() -> dict[str, object]:
        return dict(json.loads((folder / "tracking" / "mlflow.json").read_text()))

    with MetricsWriter(folder) as writer:
        train(writer, 1, 9)
        writer.step({"step": 10, "loss": math.nan})
        follow(folder)
        before = (folder / "tracking" / "mlflow.json").read_bytes()
        train(writer, 11, 11)
        follow(folder)
    (folder / "tracking" / "mlflow.json").write_bytes(before)  # killed before it noted what it sent
    with MetricsWriter(folder, resume_step=8) as writer:
        train(writer, 9, 14)
        writer.event("end", step=14)
    follow(folder)
    first = str(state()["id"])
    found = history(first, "train/grad_norm")
    assert found == [(step, 1.5) for step in (*range(1, 10), *range(11, 15))]
    run = _Server(real_server).get("runs/get", run_id=first)["run"]
    assert (run["info"]["run_name"], run["info"]["status"]) == ("mine", "FINISHED")
    assert {one["key"]: one["value"] for one in run["data"]["params"]} == {"name": "x", "optimizer.beta1": "0.9"}

    (folder / "ledger.jsonl").write_text(json.dumps({"kind": "rollback", "step": 6, "time": 1.0, "reason": "x"}) + "\n")
    with MetricsWriter(folder, resume_step=6) as writer:
        train(writer, 7, 8, run=1)
    follow(folder)
    second = str(state()["id"])
    assert state()["earlier"] == [first]
    losses = [(line["step"], line["loss"]) for line in read_metrics(folder) if line["kind"] == "step"]
    assert history(second, "train/loss") == losses
    assert history(first, "train/grad_norm") == found
