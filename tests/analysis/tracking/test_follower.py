"""A follower sends each record that counts once, after any history of the run, the tracker and itself."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from kept_tracker import Kept
from small_metrics import train

from weftrain.analysis.tracking import follower as follower_module
from weftrain.analysis.tracking.follower import Follower
from weftrain.core.errors import RunFolderError
from weftrain.core.run.metrics import MetricsWriter, read_metrics


def follow(folder: Path, tracker: Kept) -> Follower:
    follower = Follower(folder, "kept", tracker)
    follower.advance()
    follower.close()
    return follower


def effective(folder: Path, kind: str = "step") -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if line["kind"] == kind]


def enter(folder: Path, **entry: Any) -> None:
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.0, **entry}) + "\n")


def test_a_resume_goes_on_with_the_same_tracked_run(tmp_path: Path) -> None:
    tracker = Kept()
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 9)
        writer.event("checkpoint", step=6, root="ab" * 32)
    follow(tmp_path, tracker)
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        train(writer, 7, 12)
        writer.event("end", step=12)
    follow(tmp_path, tracker)
    assert tracker.losses() == effective(tmp_path) == [(step, 10 / step) for step in range(1, 13)]
    assert tracker.losses(tag="heldout/held/loss") == effective(tmp_path, "evaluation")
    assert tracker.events() == ["checkpoint of step 6, root " + "ab" * 6, "goes on from step 6", "ended after step 12"]
    assert [known for _, known, _ in tracker.opened] == [None, "run1"]
    assert tracker.endings == [("run1", "interrupted"), ("run1", "finished")]
    assert follow(tmp_path, tracker).records == 0


def test_steps_of_an_abandoned_branch_stay_where_they_are_and_another_run_takes_its_place(tmp_path: Path) -> None:
    tracker = Kept()
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 9)
    follow(tmp_path, tracker)
    enter(tmp_path, kind="rollback", step=6, reason="the loss\nrose")
    follow(tmp_path, tracker)  # by a command, before the run goes on
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        train(writer, 7, 8, run=1)
    follow(tmp_path, tracker)
    assert tracker.losses("run1") == [(step, 10 / step) for step in range(1, 10)]
    assert tracker.losses("run2") == effective(tmp_path)
    assert tracker.events("run2") == ["rolled back to step 6: the loss rose", "goes on from step 6"]
    assert ("run1", "abandoned") in tracker.endings
    run = tracker.opened[-1][0]
    assert (run.name, run.continues) == (f"{tmp_path.name} (2)", "run1")
    with MetricsWriter(tmp_path, resume_step=7) as writer:  # a crash: nothing else than what was there
        train(writer, 8, 9, run=1)
    follow(tmp_path, tracker)
    assert tracker.losses("run2") == effective(tmp_path)
    assert len(tracker.runs) == 2


@pytest.mark.parametrize(("changes", "runs"), [([["log.every_steps", 1, 2]], 1), ([["optimizer.beta1", 0.9, 0.8]], 2)])
def test_a_changed_recipe_begins_another_run_only_if_steps_that_were_sent_change(
    changes: list[Any], runs: int, tmp_path: Path
) -> None:
    tracker = Kept()
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 5)
    enter(tmp_path, kind="recipe", step=5, changes=[["optimizer.beta1", 0.8, 0.9]])  # nothing is trained again
    follow(tmp_path, tracker)
    enter(tmp_path, kind="recipe", step=3, changes=changes)
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        train(writer, 4, 6)
    follow(tmp_path, tracker)
    assert len(tracker.runs) == runs
    assert tracker.losses(f"run{runs}") == effective(tmp_path)


def attempt(folder: Path, tracker: Kept, follower: Follower | None, draw: random.Random) -> Follower | None:
    """Let a follower go on, which may fail; None if it died of that."""
    follower = follower or Follower(folder, "kept", tracker)
    tracker.fails = draw.randint(0, 1)
    with contextlib.suppress(ConnectionError):
        follower.advance()
        return follower
    if draw.random() < 0.5:
        return follower
    follower._held.close()
    return None


@pytest.mark.parametrize("rewinds", [True, False])
def test_random_histories_leave_no_gap_and_nothing_double(
    rewinds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_BATCH", 3)
    for seed in range(6):
        draw, folder, tracker = random.Random(seed), tmp_path / f"{rewinds}{seed}", Kept(rewinds)
        folder.mkdir()
        done, most, follower, branches = 0, 0, None, list[int]()
        for start in range(5):
            back = draw.randint(0, done)
            if back < done and draw.random() < 0.4:
                enter(folder, kind="rollback", step=back, reason="x")
                branches.append(back)
            with MetricsWriter(folder, resume_step=back if start else None) as writer:
                # The last start goes beyond all before it: until then a tracked run may be ahead by what a crash undid.
                for done in range(back + 1, most + 2 if start == 4 else back + draw.randint(2, 9)):
                    # After a crash a step has the value it had; the last rollback to before it decides which.
                    run = max((number for number, at in enumerate(branches, 1) if at < done), default=0)
                    train(writer, done, done, run=run)
                    if draw.random() < 0.5:
                        follower = attempt(folder, tracker, follower, draw)
            most = max(most, done)
        tracker.fails = 0
        (follower or Follower(folder, "kept", tracker)).advance()
        last = f"run{len(tracker.runs)}"
        assert [step for step, _ in tracker.losses(last)] == [step for step, _ in effective(folder)]
        assert tracker.losses(last) == effective(folder)


def test_a_place_is_found_again_after_damaged_lines_were_moved(tmp_path: Path) -> None:
    tracker = Kept()
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 6)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step: 2', 1))
    assert follow(tmp_path, tracker).damaged == 1
    with MetricsWriter(tmp_path, resume_step=6) as writer:  # moves the damaged line
        train(writer, 7, 8)
    follow(tmp_path, tracker)
    assert [step for step, _ in tracker.losses()] == [1, 3, 4, 5, 6, 7, 8]


def test_another_file_in_its_place_is_told(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 2)
    follow(tmp_path, Kept())
    (tmp_path / "metrics.jsonl").unlink()
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3, run=1)
    follower = Follower(tmp_path, "kept", Kept())
    with pytest.raises(RunFolderError, match="does not hold the line that was sent last"):
        follower.advance()


def test_two_at_once_and_a_damaged_state_are_refused(tmp_path: Path) -> None:
    first = Follower(tmp_path, "kept", Kept())
    with pytest.raises(RunFolderError, match="another process is sending to kept"):
        Follower(tmp_path, "kept", Kept())
    first.close()
    (tmp_path / "tracking" / "kept.json").write_text('{"sent": {"step": -1}}')
    with pytest.raises(RunFolderError, match=r"kept\.json: key 'sent\.step'.*delete it, and the run is sent anew"):
        Follower(tmp_path, "kept", Kept())


def test_scores_of_several_tasks_and_alerts_are_sent(tmp_path: Path) -> None:
    tracker = Kept()
    with MetricsWriter(tmp_path) as writer:
        for task, value in (("a", 0.5), ("b", 0.25)):
            writer.measured({"kind": "score", "step": 2, "set": f"suite/{task}", "metric": "acc", "value": value})
        writer.event("alert", step=3, rule="spike", action="log", value=9.0, words="loss 9 is far above 2")
    follow(tmp_path, tracker)
    assert tracker.losses(tag="score/suite/a/value") == [(2, 0.5)]
    assert tracker.losses(tag="score/suite/b/value") == [(2, 0.25)]
    assert tracker.events() == ["alert at step 3: loss 9 is far above 2"]
