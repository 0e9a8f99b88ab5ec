"""`weftrain follow s3://…`: a run whose checkpoints appear in a bucket one after another, half uploaded or to vanish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from object_store import bucket as bucket
from object_store import server as server

from weftrain.cli.main import main

ADDRESS = "s3://shelf/runs/crystal_demo"
STEPS = [f"step_0000000{step}" for step in (2, 4, 6)]
_MADE: dict[str, Path] = {}  # the run of this module, trained once


@pytest.fixture
def run(train_tiny: Callable[..., Result], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _MADE:
        assert train_tiny("schedule.steps=6", "checkpoint.every_steps=2").exit_code == 0
        _MADE["run"] = tmp_path_factory.mktemp("made") / "crystal_demo"
        (tmp_path / "runs" / "crystal_demo").rename(_MADE["run"])
    return _MADE["run"]


class Uploaded:
    """The run in the bucket, as far as it was uploaded."""

    def __init__(self, bucket: Any, run: Path) -> None:
        self._bucket, self._run = bucket, run
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        self.put("metrics.jsonl", "".join(line for line in lines if json.loads(line)["kind"] != "end").encode())
        for name in ("recipe.json", "ledger.jsonl"):
            self.put(name)

    def put(self, name: str, data: bytes | None = None) -> None:
        self._bucket.pipe(f"shelf/runs/crystal_demo/{name}", (self._run / name).read_bytes() if data is None else data)

    def checkpoint(self, step: str, *, without: str = "") -> None:
        for path in sorted((self._run / "checkpoints" / step).iterdir()):
            if path.name != without:
                self.put(f"checkpoints/{step}/{path.name}")

    def remove(self, step: str) -> None:
        self._bucket.rm(f"shelf/runs/crystal_demo/checkpoints/{step}", recursive=True)


def look(to: Path, *more: str) -> tuple[list[tuple[str, str]], Result]:
    result = CliRunner().invoke(main, ["follow", ADDRESS, "--to", str(to), "--json", "--no-measure", *more])
    events = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return [(event["event"], event.get("revision", event.get("kind"))) for event in events], result


def test_checkpoints_are_taken_up_as_they_appear_and_are_whole(run: Path, bucket: Any, tmp_path: Path) -> None:
    there = Uploaded(bucket, run)
    there.checkpoint(STEPS[0])
    there.checkpoint(STEPS[1], without="manifest.json")  # which is uploaded last
    events, result = look(tmp_path, "--once")
    assert events == [("revision", STEPS[0])]
    assert result.exit_code == 0, result.output
    assert look(tmp_path, "--once")[0] == []
    there.checkpoint(STEPS[1])
    assert look(tmp_path, "--once")[0] == [("revision", STEPS[1])]
    there.remove(STEPS[0])
    assert look(tmp_path, "--once")[0] == [("gone", STEPS[0])]
    there.checkpoint(STEPS[2])
    there.put("metrics.jsonl")  # which has the end
    events, result = look(tmp_path, "--every-seconds", "0.1")
    assert events == [("revision", STEPS[2])]
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "follow.json").read_bytes())["series"] == ADDRESS


def test_a_checkpoint_in_the_folder_of_another_waits_by_name(run: Path, bucket: Any, tmp_path: Path) -> None:
    there = Uploaded(bucket, run)
    for step in STEPS:
        there.checkpoint(step)
    for path in sorted((run / "checkpoints" / STEPS[0]).iterdir()):
        there.put(f"checkpoints/{STEPS[1]}/{path.name}", path.read_bytes())
    events, result = look(tmp_path, "--once")
    assert events == [("revision", STEPS[0]), ("waiting", STEPS[1]), ("revision", STEPS[2])]
    assert result.exit_code == 1
    assert "step" in json.loads(result.stdout.splitlines()[1])["why"]


def test_a_bucket_that_is_not_there_is_one_line(bucket: Any, tmp_path: Path) -> None:
    for address in ("s3://nowhere/runs/x", "s3://shelf/runs/none"):
        result = CliRunner().invoke(main, ["follow", address, "--to", str(tmp_path / "out"), "--once"])
        assert result.exit_code == 2, result.output
        assert address in result.output
        assert len(result.output.strip().splitlines()) == 1
