"""A run's folder: one process at a time, and one recipe unless each change is allowed by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_injection import KINDS, Death, Faults, injected

from weftrain.core.errors import RunFolderError
from weftrain.core.run.run_folder import ABSENT, Difference, RunFolder, differences, open_run

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "model": {"norm_eps": 1e-06, "mup": None, "rotary_interleaved": True},
    "schedule": {"steps": 10, "learning_rate": ({"shape": "linear", "steps": 10, "start": 0.0, "end": 0.001},)},
}
HOLD = """
import sys
from weftrain.core.run.run_folder import open_run
with open_run(sys.argv[1], {"name": "tiny"}):
    print("held", flush=True)
    sys.stdin.read()
"""


def changed(**sections: Any) -> dict[str, Any]:
    return RECIPE | sections


def start_holder(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_at_once_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    with start_holder(folder) as holder:
        stated = json.loads((folder / "lock").read_text())
        with pytest.raises(RunFolderError) as caught, open_run(folder, RECIPE):
            pass
        holder.kill()
    assert str(caught.value).startswith(
        f"run folder {folder} is in use by process {holder.pid} on {stated['host']} since {stated['started']}"
    )
    assert "\n" not in str(caught.value)
    with open_run(folder, RECIPE):  # the dead holder's words in the file mean nothing
        assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()


def recorded(run: RunFolder, *allow: str, step: int = 0) -> list[Difference]:
    """What changed in the recipe, which is then recorded."""
    check = run.check_recipe(set(allow))
    run.record_recipe(check, step)
    return list(check.changes)


def test_the_lock_ends_with_the_block_also_after_an_error(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), open_run(tmp_path, RECIPE):
        1 / 0  # noqa: B018
    with open_run(tmp_path, RECIPE), pytest.raises(RunFolderError, match="in use"), open_run(tmp_path, RECIPE):
        pass


def test_leftovers_of_dead_processes_are_removed_by_the_holder_alone(tmp_path: Path) -> None:
    with open_run(tmp_path, RECIPE) as run:
        leftover = run.checkpoints / ".tmp-step_00000005-1-ab"
        leftover.mkdir(parents=True)
        (leftover / "state-00001-of-00001.safetensors").write_bytes(b"half")
        (tmp_path / ".tmp-recipe.json-1-ab").write_bytes(b"half")
        with suppress(RunFolderError), open_run(tmp_path, RECIPE):
            pass
        assert leftover.exists()
    with open_run(tmp_path, RECIPE) as run:
        assert not list(tmp_path.rglob(".tmp-*"))


def test_the_resolved_recipe_is_recorded_and_an_equal_one_passes_silently(tmp_path: Path) -> None:
    with open_run(tmp_path, RECIPE) as run:
        assert recorded(run) == []
        run.write_environment({"host": "a"})
    stored = json.loads((tmp_path / "recipe.json").read_text())
    assert stored == yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == json.loads(json.dumps(RECIPE))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name.startswith("recipe")}
    with open_run(tmp_path, RECIPE) as run:
        assert recorded(run) == []
    assert before == {
        path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name.startswith("recipe")
    }
    assert json.loads((tmp_path / "environment.json").read_text()) == {"host": "a"}


def test_a_changed_recipe_is_refused_with_every_change_and_the_flags(tmp_path: Path) -> None:
    with open_run(tmp_path, RECIPE) as run:
        recorded(run)
    new = changed(seed=2, model=RECIPE["model"] | {"norm_eps": 1e-05})
    changes = [("model.norm_eps", 1e-06, 1e-05), ("seed", 1, 2)]
    for allow in (set(), {"seed"}, {"model"}, {"seed", "model.norm"}):
        with open_run(tmp_path, new) as run, pytest.raises(RunFolderError) as caught:
            run.check_recipe(allow)
        message = str(caught.value)
        assert "model.norm_eps: 1e-06 -> 1e-05, seed: 1 -> 2" in message
        assert "--allow model.norm_eps --allow seed" in message
        assert str(tmp_path) in message
        assert "\n" not in message
    assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == 1

    with open_run(tmp_path, new) as run:
        assert recorded(run, "seed", "model.norm_eps", "unused", step=100) == changes
    assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == 2
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["seed"] == 2
    assert json.loads((tmp_path / "recipe.100.json").read_text())["seed"] == 1
    with open_run(tmp_path, changed(seed=3, model=new["model"])) as run:
        recorded(run, "seed", step=100)
    assert json.loads((tmp_path / "recipe.100-2.json").read_text())["seed"] == 2


def test_differences_are_leaves_with_dotted_keys() -> None:
    old = {"a": {"b": 1, "c": [1, {"d": 2}], "e": None}, "gone": 0, "number": 1, "flag": True}
    new = {"a": {"b": 1, "c": [1, {"d": 3}, 4], "e": {"f": 5}}, "number": 1.0, "flag": 1, "new": "x"}
    assert differences(old, new) == [
        ("a.c.1.d", 2, 3),
        ("a.c.2", ABSENT, 4),
        ("a.e", None, {"f": 5}),
        ("flag", True, 1),
        ("gone", 0, ABSENT),
        ("new", ABSENT, "x"),
    ]
    assert differences(old, old) == []


def test_a_key_on_one_side_only_is_shown_as_absent(tmp_path: Path) -> None:
    with open_run(tmp_path, RECIPE) as run:
        recorded(run)
    with (
        open_run(tmp_path, changed(extra="x")) as run,
        pytest.raises(RunFolderError, match=r'extra: \(absent\) -> "x"'),
    ):
        run.check_recipe(set())


def test_a_damaged_record_is_refused_not_replaced(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"a": 1, "a": 2}'):
        (tmp_path / "recipe.json").write_text(text)
        with open_run(tmp_path, RECIPE) as run, pytest.raises(RunFolderError, match=r"recipe\.json: damaged"):
            run.check_recipe(set())
        assert (tmp_path / "recipe.json").read_text() == text


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match=str(folder)), open_run(folder, RECIPE):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders; the EROFS fault below stands in")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"), open_run(tmp_path, RECIPE):
        pass


def start(folder: Path, recipe: dict[str, Any], *allow: str) -> None:
    with open_run(folder, recipe) as run:
        recorded(run, *allow, step=7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_of_a_start_may_fail_or_be_the_last(tmp_path: Path, kind: str) -> None:
    new = changed(seed=2)
    start(tmp_path / "count", RECIPE)
    with injected(Faults()) as counted:
        start(tmp_path / "count", new, "seed")
    assert len(counted.trace) >= 15
    for at in range(len(counted.trace)):
        folder = tmp_path / f"{at}"
        start(folder, RECIPE)
        with injected(Faults(kind, at)), suppress(Death):
            try:
                start(folder, new, "seed")
            except RunFolderError as error:
                assert "\n" not in str(error)  # noqa: PT017
        assert json.loads((folder / "recipe.json").read_text())["seed"] in (1, 2)
        start(folder, new, "seed")
        assert json.loads((folder / "recipe.json").read_text())["seed"] == 2
        assert json.loads((folder / "recipe.7.json").read_text())["seed"] == 1
        assert not list(folder.rglob(".tmp-*"))


def test_a_refusal_needs_no_torch() -> None:
    code = (
        "import sys, weftrain.core.run.run_folder, weftrain.core.run.metrics, weftrain.core.formats.fsops; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
