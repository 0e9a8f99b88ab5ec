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


_MADE: dict[str, Path] = {}  # the run of this module, trained once


@pytest.fixture
def run(
    train_tiny: Callable[..., Result], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, bucket: Any
) -> Path:
    """A run of six steps here and, the same files, in the bucket."""
    if not _MADE:
        assert train_tiny("schedule.steps=6", "checkpoint.every_steps=2").exit_code == 0
        _MADE["run"] = tmp_path_factory.mktemp("made") / "crystal_demo"
        (tmp_path / "runs" / "crystal_demo").rename(_MADE["run"])
    bucket.put(str(_MADE["run"]), "shelf/runs/crystal_demo", recursive=True)
    return _MADE["run"]


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
        ("webdav://host/a", "webdav:// cannot be used"),
    ],
)
def test_what_goes_wrong_is_one_line(address: str, words: str, weftrain: Callable[..., Result], bucket: Any) -> None:
    found = weftrain("log", address)
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert words in found.output
    assert "word@" not in found.output
    assert "the-secret-key" not in found.output


@pytest.fixture
def train_there(
    weftrain: Callable[..., Result], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """train_there("schedule.steps=4", staging="a"): the tiny run at s3://shelf/runs."""
    monkeypatch.setattr("weftrain.exchange.remote.staging._LOOK_S", 0.02)

    def run(*arguments: str, staging: str = "a") -> Result:
        options = ("--runs", "s3://shelf/runs", "--staging", tmp_path / staging)
        return weftrain("train", "crystal_demo", *tiny_overrides, "checkpoint.every_steps=2", *options, *arguments)

    return run


def test_a_run_at_an_address_goes_on_where_another_machine_left_it(
    train_there: Callable[..., Result],
    train_tiny: Callable[..., Result],
    weftrain: Callable[..., Result],
    bucket: Any,
    tmp_path: Path,
) -> None:
    first = train_there("schedule.steps=4", staging="a")
    assert first.exit_code == 0, first.output
    assert "--runs s3://shelf/runs --staging" in first.output
    longer = ("schedule.steps=6", "--allow", "schedule.steps")
    second = train_there(*longer, staging="b")
    assert second.exit_code == 0, second.output
    assert train_tiny("schedule.steps=4", "checkpoint.every_steps=2").exit_code == 0
    assert train_tiny("checkpoint.every_steps=2", *longer).exit_code == 0

    def roots(folder: Path) -> list[str]:
        lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
        return [line["root"] for line in lines if line["kind"] == "checkpoint"]

    assert roots(tmp_path / "b" / "crystal_demo") == roots(tmp_path / "runs" / "crystal_demo")
    bucket.get("shelf/runs/crystal_demo", str(tmp_path / "there"), recursive=True)
    for name in ("ledger.jsonl", "metrics.jsonl", "recipe.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "b" / "crystal_demo" / name).read_bytes()
    for step in (2, 4, 6):
        assert weftrain("verify", tmp_path / "there" / "checkpoints" / f"step_{step:08}").exit_code == 0
    assert not (tmp_path / "there" / "lease.json").exists()
    assert not (tmp_path / "there" / "mirror.json").exists()
    third = train_there(*longer, staging="a")  # behind, and complete
    assert "is complete: 6 of 6 steps" in third.output, third.output
    words = [path.read_text() for path in (tmp_path / "b").rglob("*.json*")] + [first.output, second.output]
    assert not any("the-secret-key" in text or "the-key-id" in text for text in words)


def test_two_machines_that_went_on_apart_are_refused(train_there: Callable[..., Result], bucket: Any) -> None:
    assert train_there("schedule.steps=2", staging="a").exit_code == 0
    bucket.rm("shelf/runs/crystal_demo", recursive=True)
    assert train_there("schedule.steps=2", staging="b").exit_code == 0
    refused = train_there("schedule.steps=2", staging="a")
    assert refused.exit_code == 2
    assert "went on differently after line 0" in refused.output


def test_a_bucket_that_is_not_there_is_refused_before_step_0(
    weftrain: Callable[..., Result], bucket: Any, tmp_path: Path
) -> None:
    found = weftrain("train", "crystal_demo", "--runs", "s3://absent/runs", "--staging", tmp_path / "a")
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert "there is no such bucket" in found.output
    assert not (tmp_path / "a").exists()


def test_verbs_change_a_run_by_its_address(
    run: Path, weftrain: Callable[..., Result], train_there: Callable[..., Result], bucket: Any, tmp_path: Path
) -> None:
    def there() -> list[str]:
        found = bucket.glob("shelf/runs/crystal_demo/**/step_*/manifest.json")
        return sorted(name.removeprefix("shelf/runs/crystal_demo/").removesuffix("/manifest.json") for name in found)

    back = weftrain("rollback", ADDRESS, "--to", "4", "--reason", "a spike")
    assert back.exit_code == 0, back.output
    steps = [f"checkpoints/step_0000000{step}" for step in (2, 4)]
    assert there() == ["branches/1/step_00000006", *steps]
    pruned = weftrain("prune", ADDRESS, "--keep-last", "1", "--yes")
    assert pruned.exit_code == 0, pruned.output
    assert there() == ["branches/1/step_00000006", steps[1]]
    again = train_there("schedule.steps=6")
    assert again.exit_code == 0, again.output
    assert there() == ["branches/1/step_00000006", steps[1], "checkpoints/step_00000006"]
    for name in there():
        assert weftrain("verify", f"{ADDRESS}/{name}").exit_code == 0


def test_a_run_starts_from_one_at_an_address_as_from_its_folder(
    run: Path, train_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    tensors = []
    for name, place in (("there", ADDRESS), ("here", str(run))):
        start = f"start_from={{folder: '{place}', step: 4, state: all}}"
        found = train_tiny("schedule.steps=2", "--run", name, start)
        assert found.exit_code == 0, found.output
        manifest = tmp_path / "runs" / name / "checkpoints" / "step_00000002" / "manifest.json"
        tensors.append(json.loads(manifest.read_text())["tensors"])
    assert tensors[0] == tensors[1]
    refused = train_tiny("--run", "third", "start_from={folder: 's3://shelf/nothing', state: all}")
    assert refused.exit_code == 2
    assert "s3://shelf/nothing: there is nothing" in refused.output
    assert not (tmp_path / "runs" / "third").exists()


@pytest.mark.parametrize(
    "words", [("show",), ("runs",), ("watch", "--once"), ("track", "--to", "tensorboard"), ("data", "stats")]
)
def test_verbs_that_take_no_address_say_so(words: tuple[str, ...], weftrain: Callable[..., Result]) -> None:
    found = weftrain(*words, ADDRESS)
    assert found.exit_code == 2
    assert f"'{ADDRESS}' is an address" in found.output.replace("\n", " ")


def test_signing_takes_no_address(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    refused = weftrain("sign", ADDRESS, "--key", tmp_path / "key")
    assert "changes folders of this machine only" in refused.output


def test_a_batch_script_keeps_an_address(weftrain: Callable[..., Result]) -> None:
    asked = ("launch", "llama32_1b", "--nodes", "4", "--per-node", "8", "--runs", "s3://shelf/runs")
    script = weftrain(*asked)
    assert script.exit_code == 0, script.output
    assert "--runs s3://shelf/runs" in script.output
    assert "name it from the root" in weftrain(*asked, "--spares", "1").output
