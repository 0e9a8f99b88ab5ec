"""Series on this machine: folders of revisions, a trainer's checkpoints, a git clone, and a release of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from planted_series import CONFIG, clean, file_of, revision, trained

from weftrain.exchange.audit.audit import Audit, audit, open_series
from weftrain.exchange.audit.clone import CloneSeries
from weftrain.exchange.audit.local import FolderSeries, files_identity


def written(folder: Path, revisions: Mapping[str, Mapping[str, bytes]]) -> Path:
    for name, files in revisions.items():
        for path, data in files.items():
            place = folder / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    return folder


def kinds(found: Audit) -> dict[str, list[tuple[str, ...]]]:
    names: dict[str, list[tuple[str, ...]]] = {}
    for finding in found.findings:
        names.setdefault(finding.kind, []).append(finding.revisions)
    return names


def test_a_clean_folder_and_one_with_equal_revisions(tmp_path: Path) -> None:
    series = written(tmp_path, clean([1000, 2000, 3000, 4000, 5000]))
    found = audit(open_series(str(series)), "deep")
    assert (found.findings, len(found.revisions), found.kind) == ((), 5, "folder of revisions")
    shutil.copy(series / "step2000" / "model.safetensors", series / "step4000")
    assert kinds(audit(open_series(str(series)))) == {"duplicate": [("step2000", "step4000")]}


def test_tensors_are_compared_where_files_differ(tmp_path: Path) -> None:
    """The same tensors in shards, and a mixture of two revisions."""
    weights = trained([1000, 2000, 3000, 4000, 5000])
    revisions = {f"step{step}": revision(some) for step, some in weights.items() if step < 4000}
    names = list(weights[3000])
    revisions["step4000"] = {"config.json": json.dumps(CONFIG).encode()} | {
        f"model-{part}-of-2.safetensors": file_of({name: weights[3000][name] for name in some})
        for part, some in ((1, names[:9]), (2, names[9:]))
    }
    mixed = {name: weights[1000 if number < len(names) - 4 else 5000][name] for number, name in enumerate(names)}
    revisions["step5000"] = revision(mixed)
    found = kinds(audit(open_series(str(written(tmp_path, revisions)))))
    assert found == {"duplicate": [("step3000", "step4000")], "near duplicate": [("step1000", "step5000")]}


def test_frozen_tensors_are_no_near_duplicates(tmp_path: Path) -> None:
    weights = trained([1000, 2000, 3000])
    for some in weights.values():
        some.update({name: weights[1000][name] for name in some if "norm" not in name})
    series = written(tmp_path, {f"step{step}": revision(some) for step, some in weights.items()})
    assert audit(open_series(str(series))).findings == ()


def test_a_trainers_checkpoints_with_states_of_their_own(tmp_path: Path) -> None:
    revisions = {
        f"checkpoint-{step}": {
            **revision(weights),
            "trainer_state.json": json.dumps({"global_step": 300 if step == 400 else step}).encode(),
            "optimizer.pt": b"never opened",
            f"global_step{step}/mp_rank_00_model_states.pt": b"never opened",
        }
        for step, weights in trained([100, 200, 400]).items()
    }
    found = audit(open_series(str(written(tmp_path / "runs", revisions).parent)))
    assert found.revisions == tuple(f"runs/checkpoint-{step}" for step in (100, 200, 400))
    assert kinds(found) == {"out of order": [("runs/checkpoint-400",)]}
    facts = {fact.name: fact.status for fact in found.facts}
    assert facts["optimizer state"] == "present"
    assert facts["data order"] == "absent"


def test_recorded_losses_that_jump(tmp_path: Path) -> None:
    steps = list(range(1000, 16_000, 1000))
    series = written(tmp_path, {name: files for name, files in clean(steps).items() if name != "main"})
    for index, step in enumerate(steps):
        place = series / f"step{step}" / "analyses" / "evaluations" / "record.json"
        place.parent.mkdir(parents=True)
        loss = 4.0 - 0.02 * index + (1.5 if step == 9000 else 0.0)
        place.write_text(json.dumps({"task": "mine", "metric": "loss", "value": loss, "checkpoint": "root"}))
    found = kinds(audit(open_series(str(series)), "deep"))
    assert found == {"loss jump": [("step9000",)]}
    assert audit(open_series(str(series))).findings == ()


def test_names_without_the_word_step(tmp_path: Path) -> None:
    series = written(tmp_path, {f"rev{step}": revision(weights) for step, weights in trained([1, 2, 3]).items()})
    assert FolderSeries(series).refs() == ["rev1", "rev2", "rev3"]


def test_files_are_hashed_where_their_pieces_agree(tmp_path: Path) -> None:
    data = np.zeros(1 << 20, np.uint8)
    for number, at in enumerate((7, 7, 5000)):
        changed = data.copy()
        changed[at] = 1
        (tmp_path / f"{number}.safetensors").write_bytes(changed.tobytes())
    found = files_identity({str(number): [tmp_path / f"{number}.safetensors"] for number in range(3)})
    assert found["0"] == found["1"] != found["2"]
    assert found["0"].startswith("sha256:")


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=n", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *own, "-C", str(folder), *words], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_clone_is_compared_by_its_pointers(tmp_path: Path) -> None:
    """Weights that git LFS keeps were not fetched for step1000 and step2000; the others lie in git itself."""
    git(tmp_path, "init", "-q")
    ran = tmp_path / "ran"
    for key in ("core.fsmonitor", "core.sshCommand"):
        git(tmp_path, "config", key, f"touch {ran}")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 7
    weights = trained([3000, 4000])
    for step in (1000, 2000, 3000, 4000):
        files = {"config.json": json.dumps(CONFIG).encode(), "note.txt": b"%d" % step, "model.safetensors": pointer}
        files |= revision(weights[step]) if step in weights else {}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        git(tmp_path, "checkout", "-q", "-b", f"step{step}")
        git(tmp_path, "add", *files)
        git(tmp_path, "commit", "-q", "-m", f"step {step}")
    ran.unlink(missing_ok=True)  # git itself ran it just now
    series = open_series(str(tmp_path))
    assert isinstance(series, CloneSeries)
    found = audit(series, "deep")
    assert not ran.exists()
    assert kinds(found) == {"duplicate": [("step1000", "step2000")]}
    assert any("of 2 of 4 revisions, 1 layout " in fact.evidence for fact in found.facts)
