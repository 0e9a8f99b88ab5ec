"""Files that earlier code wrote still load, verify and go on unchanged: datasets, runs, stores, releases, exports,
results.

tests/earlier_files/make.py made them and says how. Integers, hashes and loaded tensors are compared exactly. Losses of
further steps, and the replay of a release, are compared with a tolerance, because another CPU or another version of
torch adds in another order.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.speed import Peak

HERE = Path(__file__).parent / "earlier_files"
SAME_LOSS = 1e-6  # relative: fp32 sums of a model this small, in any order


def _load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_earlier_files", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make()


@pytest.fixture(scope="module", params=sorted(path.parent.name for path in HERE.glob("*/files.tar.xz")))
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What was recorded when the files were made. They lie in the working directory, which is the whole module's: copy
    before a change.
    """
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(HERE / request.param / "files.tar.xz") as kept:
        kept.extractall(folder, filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
        patch.setattr("sys.argv", ["weftrain"])
        yield json.loads((HERE / request.param / "expected.json").read_text())


def newest(run: str) -> State:
    path = checkpoint.newest(Path(run, "checkpoints"), print)
    assert path is not None
    return checkpoint.load(path)[0]


def same_tensors(ours: State, theirs: State, prefix: str = "") -> bool:
    names = {name for name in theirs.tensors if name.startswith(prefix)}
    return names == set(ours.tensors) and all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in names)


@pytest.mark.parametrize("name", ["prose", "code"])
def test_datasets(expected: dict[str, Any], name: str) -> None:
    ids = expected["dataset_ids"][name]
    found = make.read_dataset_manifest(Path("datasets", name))
    assert (found.train.id, found.heldout.id) == (ids["train"], ids["heldout"])
    assert f"whole, id {ids['train']}" in make.command("data", "verify", f"datasets/{name}")


def test_training_reads_the_same_rows(expected: dict[str, Any]) -> None:
    assert make.rows_sha256("runs/crystal/recipe.yaml", 8) == expected["rows_sha256_8_steps"]


def test_the_preparation_recipe_finds_its_datasets_up_to_date(expected: dict[str, Any]) -> None:
    said = make.command("prep", "prep.yaml", "--inputs", "texts", "--output", "datasets", "--workers", "1")
    assert said.count("is up to date") == 2


def test_checkpoints(expected: dict[str, Any]) -> None:
    assert expected["checkpoints"]
    for path, values in expected["checkpoints"].items():
        assert checkpoint.verify(Path(path))["root"] == values["root"], path
        assert make.state_sha256(Path(path)) == values["state_sha256"], path


def test_the_record_of_a_run(expected: dict[str, Any]) -> None:
    log = make.command("log", "runs/crystal")
    for words in (
        "recipe changed",
        "resume from",
        "rolled back",
        "on branch 1: the loss of step 3 looked odd",
        "(abandoned)",
    ):
        assert words in log
    root = expected["checkpoints"]["runs/crystal/checkpoints/step_00000004"]["root"]
    assert f"checkpoint {root[:12]}" in log
    assert "crystal_demo" in make.command("show", "runs/crystal/recipe.yaml", "--step", "3")
    compared = json.loads(make.command("compare", "runs/crystal", "release", "--json", "--no-plot"))
    assert [one["name"] for one in compared["series"]] == ["crystal", "release"]


@pytest.mark.parametrize("run", ["crystal", "mapped", "direct"])
def test_a_run_goes_on_as_it_would_have(expected: dict[str, Any], run: str) -> None:
    """crystal from its checkpoint, the others from the store that their backend keeps."""
    assert make.longer_by_two_steps(run) == pytest.approx(expected["losses_two_steps_longer"][run], rel=SAME_LOSS)


def test_a_release(expected: dict[str, Any]) -> None:
    pytest.importorskip("cryptography")
    release = expected["release"]
    assert f"root {release['root']}, signed by {release['signed_by']}" in make.command(
        "verify", "release", "--key", release["signed_by"]
    )
    replayed = make.command("replay", "release")  # fails where a link is further off than its tolerance
    assert "different" not in replayed


@pytest.mark.parametrize("run", ["crystal", "amber"])
def test_hugging_face_folders(expected: dict[str, Any], tmp_path: Path, run: str) -> None:
    make.command("convert", "to-huggingface", f"runs/{run}", tmp_path / "again", "--dtype", "float32")
    earlier = {path.name: path.read_bytes() for path in Path("huggingface", run).iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == earlier
    recipe = f"runs/{run}/recipe.yaml"
    make.command("convert", "from-huggingface", f"huggingface/{run}", recipe, "--runs", tmp_path, "--run", "back")
    assert same_tensors(newest(str(tmp_path / "back")), newest(f"runs/{run}"), "weights/")


def test_model_zoo_files(expected: dict[str, Any], tmp_path: Path) -> None:
    recipe = "runs/crystal/recipe.yaml"
    make.command("convert", "checkpoint-to-cerebras", "runs/crystal", tmp_path / "again.mdl")
    assert (tmp_path / "again.mdl").read_bytes() == Path("modelzoo/step_4.mdl").read_bytes()
    make.command(
        "convert", "checkpoint-from-cerebras", "modelzoo/step_4.mdl", recipe, "--runs", tmp_path, "--run", "back"
    )
    back, ours = newest(str(tmp_path / "back")), newest("runs/crystal")
    assert (back.step, back.optimizer_updates) == (ours.step, ours.optimizer_updates)
    assert same_tensors(back, ours)
    assert (
        make.command("convert", "params-from-recipe", recipe, "data.chunks=null")
        == Path("modelzoo/params.yaml").read_text()
    )
    printed = make.command(
        "convert", "recipe-from-params", "modelzoo/params.yaml", "--name", "back", "--micro-batch-size", "2"
    )
    (tmp_path / "back.yaml").write_text(printed)
    converted, trained = load_recipe(str(tmp_path / "back.yaml")).recipe, load_recipe(recipe).recipe
    for section in ("model", "optimizer", "batch"):
        assert getattr(converted, section) == getattr(trained, section), section


def test_results_that_are_read_again(expected: dict[str, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree("runs/crystal", tmp_path / "crystal"))
    records = {path.name: path.read_bytes() for path in (run / "analyses" / "evaluations").iterdir()}
    assert len(records) == 4
    make.command("eval", run, "--watch", "--until-step", "4", "--every-seconds", "0.1")
    assert {path.name: path.read_bytes() for path in (run / "analyses" / "evaluations").iterdir()} == records
    assert "= 1.0000" in make.command("bench", "compare", "bench/report.json", "bench/report.json")
