"""Verbs on runs in a bucket: what they print is what they print of the same run here, and what they fetch is little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from object_store import bucket as bucket
from object_store import server as server

from weftrain.exchange.remote.store import Store

ADDRESS = "s3://shelf/runs/crystal_demo"


@pytest.fixture
def run(train_tiny: Callable[..., Result], tmp_path: Path, bucket: Any) -> Path:
    """A run of six steps here and, the same files, in the bucket."""
    assert train_tiny("schedule.steps=6", "checkpoint.every_steps=2").exit_code == 0
    folder = tmp_path / "runs" / "crystal_demo"
    bucket.put(str(folder), "shelf/runs/crystal_demo", recursive=True)
    return folder


def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is read of tensor files from now on."""
    sizes: list[int] = []
    whole = Store.read

    def read(self: Store, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = whole(self, name, start, stop)
        if name.endswith(".safetensors"):
            sizes.append(len(data))
        return data

    monkeypatch.setattr(Store, "read", read)
    return sizes


def test_verbs_read_a_run_by_its_address(
    run: Path, weftrain: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    newest = "checkpoints/step_00000006"
    commands: list[tuple[str, ...]] = [
        ("log", "{}"),
        ("verify", f"{{}}/{newest}"),
        ("generate", "{}", "--ids", "1,2,3", "--max-new-tokens", "5"),
        ("eval", f"{{}}/{newest}"),
    ]
    for command in commands:
        here, there = (weftrain(*(part.format(place) for part in command)) for place in (run, ADDRESS))
        assert (there.exit_code, there.output) == (here.exit_code, here.output.replace(str(run), ADDRESS)), command
    assert weftrain("report", ADDRESS).exit_code == 0
    assert (tmp_path / "crystal_demo.report.html").exists()


def test_a_release_is_made_and_verified_from_there(
    run: Path, weftrain: Callable[..., Result], bucket: Any, tmp_path: Path
) -> None:
    made = weftrain("release", ADDRESS, "--to", tmp_path / "release", "--licence", "Apache-2.0")
    assert made.exit_code == 0, made.output
    bucket.put(str(tmp_path / "release"), "shelf/release", recursive=True)
    assert weftrain("verify", "s3://shelf/release").exit_code == 0
    name = "shelf/release/checkpoints/step_00000004/state-00001-of-00001.safetensors"
    data = bytearray(bucket.cat_file(name))
    data[-1] ^= 1
    bucket.pipe_file(name, bytes(data))
    assert "step_00000004" in weftrain("verify", "s3://shelf/release").output


def test_generating_fetches_the_weights_alone(
    run: Path, weftrain: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, state = fetched(monkeypatch), run / "checkpoints/step_00000006/state-00001-of-00001.safetensors"
    monkeypatch.setattr("weftrain.core.formats.distant_files._FIRST_BYTES", 1 << 9)
    assert weftrain("generate", ADDRESS, "--ids", "1", "--max-new-tokens", "1").exit_code == 0
    manifest = json.loads((state.parent / "manifest.json").read_bytes())
    assert sum(sizes) < 0.7 * manifest["files"][state.name]["size"]


def test_a_checkpoint_without_a_manifest_is_not_there(run: Path, weftrain: Callable[..., Result], bucket: Any) -> None:
    bucket.rm_file("shelf/runs/crystal_demo/checkpoints/step_00000006/manifest.json")
    there = weftrain("generate", f"{ADDRESS}/checkpoints/step_00000006", "--ids", "1")
    assert there.exit_code == 2
    assert "its upload has not ended" in there.output
    older = weftrain("generate", ADDRESS, "--ids", "1", "--max-new-tokens", "1")  # of step 4
    assert older.exit_code == 0, older.output


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://absent/runs/a", "there is no such bucket"),
        ("s3://shelf/runs/other", "there is nothing"),
        ("s3://user:word@shelf/a", "credentials come from the environment"),
        ("zz://shelf/a", "no such file system"),
    ],
)
def test_what_goes_wrong_is_one_line(address: str, words: str, weftrain: Callable[..., Result], bucket: Any) -> None:
    found = weftrain("log", address)
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert words in found.output
    assert "word@" not in found.output
    assert "the-secret-key" not in found.output


def test_a_verb_that_changes_a_run_refuses_an_address(weftrain: Callable[..., Result]) -> None:
    assert "changes folders of this machine only" in weftrain("prune", ADDRESS, "--keep-last", "1").output
