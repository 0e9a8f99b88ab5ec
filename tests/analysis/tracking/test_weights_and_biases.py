"""Weights & Biases with its own package, offline: what its run files hold is what the run measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from small_metrics import train

from weftrain.analysis.tracking import weights_and_biases
from weftrain.analysis.tracking.tracker import TrackedRun, TrackerError
from weftrain.analysis.tracking.weights_and_biases import WeightsAndBiases
from weftrain.core.run.metrics import MetricsWriter, read_metrics

# By its own process, as beside a training: the package has a service and hooks that outlive a test.
FOLLOW = "import sys; from weftrain.analysis.tracking.process import main; main(__import__('pathlib').Path(sys.argv[1]), 'wandb')"
SECRET = "0123456789abcdef0123456789abcdef01234567"


def follow(folder: Path) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "MY_PASSWORD": SECRET}
    ended = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(folder)], env=environment, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tracking/wandb/offline-run-*/run-*.wandb"))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config and the history of an offline run's file. The package has a reader, which it does not document."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(path))
    config, history = {}, list[dict[str, Any]]()
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        for item in (*record.run.config.update, *record.config.update):
            config[item.key] = json.loads(item.value_json)
        assert record.run.host in ("", "not sent")
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, history


def losses(history: list[dict[str, Any]], tag: str = "train/loss") -> list[tuple[int, Any]]:
    return [(row["step"], row[tag]) for row in history if tag in row]


def test_attempts_without_a_network_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CommError(Exception):
        pass

    def init(dir: str, id: str, **_: object) -> None:
        (Path(dir) / "wandb" / f"run-1-{id}" / "files").mkdir(parents=True)
        raise CommError("no answer")

    package = types.SimpleNamespace(Settings=dict, init=init, errors=types.SimpleNamespace(Error=CommError))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(weights_and_biases.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    earlier = tmp_path / "tracking" / "wandb" / "run-0-abc"
    earlier.mkdir(parents=True)
    for known in (None, "abc"):
        with pytest.raises(TrackerError, match="no answer: check the network, WANDB_BASE_URL"):
            WeightsAndBiases().open(TrackedRun(tmp_path, {}), known, 0)
    assert list((tmp_path / "tracking" / "wandb").iterdir()) == [earlier]


@pytest.mark.prove
@pytest.mark.timeout(300)
def test_offline_runs_hold_what_was_measured_also_after_a_resume_and_a_rollback(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"name": "x", "optimizer": {"beta1": 0.9}}))
    with MetricsWriter(folder) as writer:
        train(writer, 1, 9)
        writer.samples([{"step": 9, "prompt": "a", "text": " word"}])
    follow(folder)
    with MetricsWriter(folder, resume_step=6) as writer:
        train(writer, 7, 12)
        writer.event("end", step=12)
    follow(folder)
    first, second = run_files(folder)
    assert first.name == second.name  # one run: `wandb sync` puts them together
    config, history = read(first)
    history += read(second)[1]
    assert config["optimizer.beta1"] == 0.9
    assert losses(history) == [(line["step"], line["loss"]) for line in read_metrics(folder) if line["kind"] == "step"]
    assert losses(history, "heldout/held/perplexity") == [(4, math.inf), (8, math.inf), (12, math.inf)]
    assert losses(history, "samples/1") == [(9, "a word")]
    assert losses(history, "event/resume") == [(6, "goes on from step 6")]

    (folder / "ledger.jsonl").write_text(json.dumps({"kind": "rollback", "step": 6, "time": 1.0, "reason": "x"}) + "\n")
    with MetricsWriter(folder, resume_step=6) as writer:
        train(writer, 7, 8, run=1)
    follow(folder)
    (third,) = [path for path in run_files(folder) if path.name != first.name]
    assert losses(read(third)[1]) == [
        (line["step"], line["loss"]) for line in read_metrics(folder) if line["kind"] == "step"
    ]
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
