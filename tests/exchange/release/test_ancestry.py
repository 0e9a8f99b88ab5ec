"""A release is continued as a new run: the same bits as the run itself would have made, and a record that names where it
began, which `verify --lineage` compares with the parents that are given.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from forgery import forge
from record_runs import done, weftrain
from record_runs import trainer as record_trainer
from release_cases import edited, verdicts

from weftrain.core import checkpoint, trainer
from weftrain.core.backend import StepResult
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.speed import Peak

Resume = Callable[..., Result]


def resumed(release: Path | str, runs: Path, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
        return weftrain("resume", release, "--runs", runs, "backend.options.threads=1", *arguments)


@pytest.fixture(scope="module")
def child(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on from revision 2 of the release, and the release of that run: folder/runs/child and
    folder/release.
    """
    folder = tmp_path_factory.mktemp("child")
    done(resumed(made / "release", folder / "runs", "--as", "child", "--revision", "ckpt_002"))
    done(weftrain("release", folder / "runs" / "child", "--to", folder / "release", "--licence", "MIT"))
    return folder


def tensors(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.verify(run / "checkpoints" / f"step_{step:08d}")["tensors"]
    return found


def parent_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "release" / "release.json").read_bytes())
    return found


def test_a_child_makes_the_bits_that_the_run_itself_made(made: Path, child: Path) -> None:
    run = child / "runs" / "child"
    assert tensors(run, 4) == tensors(made / "release", 4)
    assert tensors(run, 6) == tensors(made / "release", 6)
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "start"
    assert "resume" not in kinds
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 4


def test_ledger_and_release_name_root_revision_and_link(made: Path, child: Path) -> None:
    parent = parent_of(made)
    named = {"release": parent["root"], "name": "crystal_demo", "revision": "ckpt_002", "link": 2, "step": 4}
    start = read_ledger(child / "release" / "ledger.jsonl")[0]
    assert (start["kind"], start["step"], start["parent_release"]) == ("start", 4, named)
    assert start["parent"] == parent["links"][1]["end"]
    assert json.loads((child / "release" / "release.json").read_bytes())["parent"] == named
    assert "parent" not in parent


def test_a_child_is_replayed_without_its_parent_and_verified_with_it(made: Path, child: Path) -> None:
    assert verdicts(weftrain("replay", child / "release")) == ["equal"]
    alone = done(weftrain("verify", child / "release", "--lineage"))
    assert "revision ckpt_002 (step 4) of crystal_demo" in alone
    assert "absent: give it with --parent" in alone
    assert re.search(r"state that it began from +not covered", alone)
    both = done(weftrain("verify", child / "release", "--lineage", "--parent", made / "release"))
    assert "tensors equal" in both
    assert re.search(r"state that it began from +derivation", both)


def test_a_child_of_a_child_is_walked_to_the_first(made: Path, child: Path, tmp_path: Path) -> None:
    longer = ("schedule.steps=8", "data.chunks=4")
    done(resumed(child / "release", tmp_path / "runs", "--as", "third", *longer))
    done(weftrain("release", tmp_path / "runs" / "third", "--to", tmp_path / "release", "--licence", "MIT"))
    given = [word for place in (made, child) for word in ("--parent", place / "release")]
    found = done(weftrain("verify", tmp_path / "release", "--lineage", *given))
    assert [line.split(":")[0] for line in found.splitlines() if line.startswith("began from")] == [
        f"began from revision ckpt_001 (step 6) of child, root {parent_of(child)['root'][:12]}",
        f"began from revision ckpt_002 (step 4) of crystal_demo, root {parent_of(made)['root'][:12]}",
    ]
    unnamed = weftrain("verify", tmp_path / "release", "--lineage", "--parent", made / "release")
    assert unnamed.exit_code == 2
    assert "names the release child with the root" in unnamed.output


def test_a_killed_child_goes_on_by_train(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies before its first save; the command that `resume` then names trains it to the same bits."""
    run, record = tmp_path / "runs" / "mine", trainer._Recorder.step

    def dies(self: Any, result: StepResult, due: bool) -> dict[str, Any] | None:
        if result.step == 3:
            raise KeyboardInterrupt
        return record(self, result, due)

    monkeypatch.setattr(trainer._Recorder, "step", dies)
    assert resumed(made / "release", tmp_path / "runs", "--as", "mine", "--revision", "ckpt_001").exit_code == 130
    monkeypatch.undo()
    again = resumed(made / "release", tmp_path / "runs", "--as", "mine")
    assert again.exit_code == 2
    assert "mine: is there already: name a new run with --as, or train that one on with `" in again.output
    words = again.output.partition("train that one on with `")[2].partition("`")[0].split()
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    done(weftrain(*words[1:]))
    assert tensors(run, 6) == tensors(made / "release", 6)


def test_a_recipe_starts_from_a_revision_at_step_0(made: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(made / "datasets")
    start = f"start_from={{folder: {made / 'release'}, revision: ckpt_001, state: weights}}"
    done(record_trainer(tmp_path)("--run", "tuned", start))
    done(weftrain("release", tmp_path / "runs" / "tuned", "--to", tmp_path / "release", "--licence", "MIT"))
    named = json.loads((tmp_path / "release" / "release.json").read_bytes())["parent"]
    assert (named["revision"], named["step"]) == ("ckpt_001", 2)
    found = done(weftrain("verify", tmp_path / "release", "--lineage", "--parent", made / "release"))
    weights = sum(name.startswith("weights/") for name in tensors(made / "release", 2))
    assert f"{weights} tensors equal" in found
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "start"
    assert "resume" not in kinds


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a revision that is not there": (
        ("--revision", "ckpt_009"),
        "has no revision ckpt_009: it has ckpt_001 to ckpt_003",
    ),
    "a run that is complete": ((), "step 6 of folder"),
    "a batch that the chunks do not take": (("schedule.steps=9",), "data.chunks"),
    "another model": (("schedule.steps=8", "data.chunks=4", "model.num_layers=3"), "does not fit the recipe's model"),
    "a name with a slash": (("--as", "a/b"), "a run name is one word"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_go_on_is_refused_in_one_line_and_leaves_no_folder(case: str, made: Path, tmp_path: Path) -> None:
    arguments, words = REFUSED[case]
    found = resumed(made / "release", tmp_path / "runs", "--as", "mine", *arguments)
    assert found.exit_code == 2, found.output
    assert words in found.output
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_release_of_a_later_version_is_refused(release: Path, tmp_path: Path) -> None:
    edited(release, version=2)
    found = resumed(release, tmp_path / "runs", "--as", "mine")
    assert found.exit_code == 2
    assert "release.json" in found.output
    assert "version" in found.output


def test_weights_alone_are_no_state_to_continue(made: Path, tmp_path: Path) -> None:
    """A checkpoint of a release that holds weights alone, as an archive of a run does, made consistent with itself."""
    target = Path(shutil.copytree(made / "release", tmp_path / "weights_alone"))

    def weights_alone(step: int, tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith("weights/")]:
            del tensors[name]

    forge(target, tensors=weights_alone)
    found = resumed(target, tmp_path / "runs", "--as", "mine", "--revision", "ckpt_002")
    assert found.exit_code == 2
    assert "step 4 of folder" in found.output
    assert "holds weights and no optimizer state: give state: weights" in found.output


def another_start(step: int, tensors: dict[str, torch.Tensor]) -> None:
    if step == 4:
        tensors["weights/embedding.weight"] += 1.0


def test_a_child_that_began_from_another_state_is_found(made: Path, child: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(child / "release", tmp_path / "forged"))
    forge(target, tensors=another_start)
    assert "not covered" in done(weftrain("verify", target))
    found = weftrain("verify", target, "--lineage", "--parent", made / "release")
    assert found.exit_code == 2
    assert "tensor 'weights/embedding.weight' is not that of revision ckpt_002" in found.output


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "another root": ({"release": "0" * 64}, "names the release crystal_demo with the root 000000000000"),
    "another revision": ({"revision": "ckpt_001", "link": 1, "step": 2}, "begins at step 4, and its parent's revision"),
    "another link": ({"link": 3}, "has no such revision"),
}


@pytest.mark.parametrize("case", list(FORGED))
def test_a_child_that_names_a_wrong_parent_is_refused(case: str, made: Path, child: Path, tmp_path: Path) -> None:
    changes, words = FORGED[case]
    target = Path(shutil.copytree(child / "release", tmp_path / "forged"))
    named = json.loads((target / "release.json").read_bytes())["parent"] | changes

    def ledger(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [lines[0] | {"parent_release": named}, *lines[1:]]

    forge(target, ledger=ledger, of_release=lambda value: value.update(parent=named))
    found = weftrain("verify", target, "--lineage", "--parent", made / "release")
    assert found.exit_code == 2, found.output
    assert words in found.output
