"""`weftrain follow`: a hub-like server whose revisions appear one after another, half uploaded or to vanish, and a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hub_server import Hub, commit_of, served
from planted_series import CONFIG, file_of, trained

from weftrain.cli.main import main

Files = dict[str, bytes]
IDS = json.dumps({"ids": [3, 5, 7, 11, 13, 17]}) + "\n"


@pytest.fixture(scope="module")
def revisions() -> dict[str, Files]:
    config = json.dumps(CONFIG).encode()
    steps = (1000, 2000, 3000)
    made = trained(steps)
    return {f"step{step}": {"config.json": config, "model.safetensors": file_of(made[step])} for step in steps}


def follow(hub: Hub, to: Path, *more: str) -> tuple[list[dict[str, Any]], Result]:
    words = ["follow", "hub:owner/name", "--endpoint", hub.endpoint, "--to", str(to), "--once", "--json", *more]
    result = CliRunner().invoke(main, words)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines], result


def kinds(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["event"], event.get("revision", event.get("kind", ""))) for event in events]


def test_revisions_are_measured_once_as_they_appear(revisions: dict[str, Files], tmp_path: Path) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text(IDS)
    loss = ("--loss-on", str(ids), "--device", "cpu")
    with served(Hub({"step1000": revisions["step1000"]})) as hub:
        first, result = follow(hub, tmp_path / "out", *loss)
        assert result.exit_code == 0, result.output
        assert kinds(first) == [("revision", "step1000"), ("score", "step1000")]
        assert first[1]["metric"] == "loss"
        assert 3.0 < first[1]["value"] < 5.0  # of 48 ids
        hub.revisions = {**hub.revisions, "step2000": revisions["step2000"]}
        before = len(hub.asked)
        second, _ = follow(hub, tmp_path / "out", *loss)
        assert kinds(second) == [("revision", "step2000"), ("score", "step2000")]
        assert second[1]["value"] != first[1]["value"]
        assert not any(commit_of("step1000") in path and "resolve" in path for path in hub.asked[before:])
        assert follow(hub, tmp_path / "out", *loss)[0] == []
    assert len(list((tmp_path / "out" / "evaluations").iterdir())) == 2


def test_one_that_is_half_uploaded_waits_and_one_that_vanishes_is_named(
    revisions: dict[str, Files], tmp_path: Path
) -> None:
    whole = revisions["step2000"]
    with served(Hub({"step1000": revisions["step1000"], "step2000": {"config.json": whole["config.json"]}})) as hub:
        events, result = follow(hub, tmp_path)
        assert kinds(events) == [("revision", "step1000"), ("waiting", "step2000")]
        assert "not there yet" in events[1]["why"]
        assert result.exit_code == 1
        # a commit whose name is the branch's stands for another one here: a pushed file makes another commit on a hub
        hub.revisions = {"step1000": revisions["step1000"], "step2000": whole}
        assert kinds(follow(hub, tmp_path)[0]) == [("revision", "step2000")]
        hub.revisions = {"step2000": whole}
        gone, result = follow(hub, tmp_path)
        assert kinds(gone) == [("gone", "step1000")]
        assert result.exit_code == 0
        assert follow(hub, tmp_path)[0] == []  # it is told once


def test_torn_bytes_and_a_server_that_fails_wait(revisions: dict[str, Files], tmp_path: Path) -> None:
    """The list has the hash of the whole file, and what comes is shorter; then a file that is listed and not there."""
    ids = tmp_path / "ids.jsonl"
    ids.write_text(IDS)
    loss = ("--loss-on", str(ids), "--device", "cpu")
    torn = revisions["step2000"]["model.safetensors"][:-40]
    with served(Hub({"step1000": revisions["step1000"], "step2000": dict(revisions["step2000"])})) as hub:
        listing = hub.listing(revisions["step2000"])
        hub.listing = lambda files: listing if files.get("model.safetensors") == torn else Hub.listing(hub, files)  # type: ignore[method-assign]
        hub.revisions["step2000"]["model.safetensors"] = torn  # type: ignore[index]
        events, _ = follow(hub, tmp_path / "out", *loss)
        assert kinds(events) == [("revision", "step1000"), ("score", "step1000"), ("waiting", "step2000")]
        assert "bytes came that are not those of its list" in events[2]["why"]
        missing = commit_of("step2000")
        hub.faults = lambda path, count: 404 if missing in path and "resolve" in path else None
        again, _ = follow(hub, tmp_path / "out", *loss)
        assert kinds(again) == [("waiting", "step2000")]
        assert "HTTP 404" in again[0]["why"]


def test_a_planted_duplicate_and_a_pickled_revision_are_told_once(revisions: dict[str, Files], tmp_path: Path) -> None:
    copied = {"step4000": revisions["step3000"], "step3000": revisions["step3000"]}
    pickled = {"config.json": revisions["step1000"]["config.json"], "pytorch_model.bin": b"\x80pickle"}
    ids = tmp_path / "ids.jsonl"
    ids.write_text(IDS)
    with served(Hub({"step1000": pickled, **copied})) as hub:
        events, result = follow(hub, tmp_path / "out", "--loss-on", str(ids), "--device", "cpu")
        assert ("failed", "step1000") in kinds(events)
        assert ("finding", "duplicate") in kinds(events)
        assert result.exit_code == 1
        assert follow(hub, tmp_path / "out", "--loss-on", str(ids), "--device", "cpu")[0] == []


def test_a_kill_between_two_revisions_loses_nothing(
    revisions: dict[str, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftrain.analysis.evaluation import follow as module

    ids = tmp_path / "ids.jsonl"
    ids.write_text(IDS)
    loss = ("--loss-on", str(ids), "--device", "cpu")
    fetch = module.fetch

    def dies(series: Any, revision: Any, folder: Path) -> None:
        if revision.name == "step2000":
            raise KeyboardInterrupt
        fetch(series, revision, folder)

    with served(Hub(revisions)) as hub:
        monkeypatch.setattr(module, "fetch", dies)
        events, result = follow(hub, tmp_path / "out", *loss)
        assert result.exit_code == 130
        assert ("score", "step1000") in kinds(events)
        monkeypatch.undo()
        events, _ = follow(hub, tmp_path / "out", *loss)
        assert [name for event, name in kinds(events) if event == "revision"] == ["step2000", "step3000"]
    state = json.loads((tmp_path / "out" / "follow.json").read_bytes())
    assert sorted(state["done"]) == ["step1000", "step2000", "step3000"]


def test_ten_thousand_revisions_are_asked_for_once(revisions: dict[str, Files], tmp_path: Path) -> None:
    """A look without anything new costs one request, whatever the number of revisions that are done."""
    from weftrain.analysis.evaluation.follow import Follower
    from weftrain.exchange.audit.series import ListedFile, Revision, Series

    header = file_of({"w": np.zeros(2)})

    class Many(Series):
        where, kind, asked = "hub:many/revisions", "made", 0

        def refs(self) -> list[str]:
            return [f"step{step}" for step in range(10_000)]

        def mark(self, name: str) -> str:
            return name

        def revision(self, name: str) -> Revision:
            Many.asked += 1
            weights = (ListedFile("model.safetensors", len(header), f"sha256:{name}"),)
            return Revision(name, name, weights, False, None, None, False, False)

        def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
            return header[start:stop]

    told: list[Any] = []
    for _ in range(2):
        follower = Follower(
            "many", lambda: nullcontext(Many()), tmp_path, lambda *one: (), depth=None, tell=told.append
        )
        assert follower.look() is False
    assert (len(told), Many.asked) == (10_000, 10_000)
    assert (tmp_path / "follow.json").stat().st_size < 1 << 20


def test_a_run_is_followed_to_its_end(train_tiny: Callable[..., Result], tmp_path: Path) -> None:
    done = train_tiny("schedule.steps=4", "checkpoint.every_steps=2", "--run", "followed")
    assert done.exit_code == 0, done.output
    words = ["follow", str(tmp_path / "runs" / "followed"), "--to", str(tmp_path / "out"), "--no-measure", "--json"]
    result = CliRunner().invoke(main, [*words, "--every-seconds", "0.1"])
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [event["revision"] for event in events if event["event"] == "revision"] == ["step_00000002", "step_00000004"]


def test_a_state_of_another_series_is_refused(revisions: dict[str, Files], tmp_path: Path) -> None:
    with served(Hub(revisions)) as hub:
        assert follow(hub, tmp_path)[1].exit_code == 0
    result = CliRunner().invoke(main, ["follow", str(tmp_path), "--to", str(tmp_path), "--once"])
    assert result.exit_code == 2
    assert "follow.json: is of hub:owner/name" in result.output
    (tmp_path / "follow.json").write_text("{}")
    result = CliRunner().invoke(main, ["follow", str(tmp_path), "--to", str(tmp_path), "--once"])
    assert "remove it to take up all revisions again" in result.output
