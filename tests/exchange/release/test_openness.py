"""`openness` of a folder in the style of the hub; that of a release is tested with releases."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import Hub, served

from weftrain.cli.main import main
from weftrain.core.errors import ReleaseError
from weftrain.exchange.release.openness import PREVENTS, openness


def statuses(folder: Path) -> dict[str, str]:
    kind, items = openness(folder)
    assert kind == "folder in the style of the Hugging Face hub"
    assert [item.name for item in items] == list(PREVENTS)
    assert all(item.evidence and item.prevents for item in items)
    return {item.name: item.status for item in items}


def pythia(folder: Path, revisions: int) -> Path:
    """As a clone of such a repository looks: a branch a checkpoint, weights, a card with licence and dataset; no data,
    no optimizer.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ndatasets:\n- EleutherAI/pile\n---\n# A model\n")
    (folder / ".git").mkdir()
    refs = [f"{number:040x} refs/remotes/origin/step{number * 1000}" for number in range(1, revisions + 1)]
    (folder / ".git" / "packed-refs").write_text(
        "\n".join(["# pack-refs with: peeled fully-peeled sorted", "f" * 40 + " refs/heads/main", *refs])
    )
    return folder


def test_a_series_like_pythias(tmp_path: Path) -> None:
    found = statuses(pythia(tmp_path / "pythia", 143))
    present = {"final weights", "intermediate checkpoints", "licence"}
    assert {name for name, status in found.items() if status == "present"} == present
    assert {name for name, status in found.items() if status == "partial"} == {"training data"}
    intermediate = next(item for item in openness(tmp_path / "pythia")[1] if item.name == "intermediate checkpoints")
    assert "143 revisions, 1000 .. 143000" in intermediate.evidence


def test_what_a_folder_adds_is_seen(tmp_path: Path) -> None:
    folder = pythia(tmp_path / "more", 0)
    assert statuses(folder)["intermediate checkpoints"] == "absent"
    for name in ("ckpt_001", "ckpt_002", "ckpt_003"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(name.encode())
    (folder / "ckpt_003" / "optimizer.pt").write_bytes(b"x")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "train.parquet").write_bytes(b"x")
    (folder / "pythia_config.yml").write_text("a: 1")
    (folder / "train_gpt.py").write_text("")
    (folder / "eval_results").mkdir()
    (folder / "eval_results" / "arc.json").write_text("{}")
    found = statuses(folder)
    for name in ("intermediate checkpoints", "distinct revisions", "optimizer state", "metrics", "training data"):
        assert found[name] == "present", name
    for name in ("recipe", "training code", "analyses"):
        assert found[name] == "partial", name
    for name in ("data order", "record of restarts", "environment", "proof", "data preparation"):
        assert found[name] == "absent", name


def test_a_pickle_alone_is_partial_and_no_card_is_no_licence(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    found = statuses(tmp_path)
    assert found["final weights"] == "partial"
    assert found["licence"] == "absent"
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n")
    assert statuses(tmp_path)["licence"] == "absent"


def test_revisions_with_the_same_weights_are_named(tmp_path: Path) -> None:
    """Also where they differ in one byte only, between the places that are read first, or in one of several files."""
    size = 1 << 20
    for step, at in ((1000, 7), (2000, 7), (3000, 5000), (4000, None)):
        for shard in (1, 2):
            data = bytearray(size)
            if at is not None and shard == 2:
                data[at] = 1
            place = tmp_path / f"step{step}" / f"model-{shard:05d}-of-00002.safetensors"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
    item = next(item for item in openness(tmp_path)[1] if item.name == "distinct revisions")
    assert item.status == "absent"
    assert re.fullmatch(r"the same weights: step1000 = step2000 \(sha256 [0-9a-f]{12}\)", item.evidence)
    assert CliRunner().invoke(main, ["openness", str(tmp_path)]).exit_code == 1
    assert CliRunner().invoke(main, ["openness", str(tmp_path), "--json"]).exit_code == 1
    (tmp_path / "step2000" / "model-00001-of-00002.safetensors").write_bytes(b"other")
    assert statuses(tmp_path)["distinct revisions"] == "present"
    assert CliRunner().invoke(main, ["openness", str(tmp_path)]).exit_code == 0


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ReleaseError, match=r"neither release\.json nor a model's"):
        openness(tmp_path)
    with pytest.raises(ReleaseError, match="is no folder"):
        openness(tmp_path / "nothing")


def test_a_repository_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    card = b"---\nlicense: apache-2.0\ndatasets:\n- EleutherAI/pile\n---\n# A model\n"
    files = {"config.json": b"{}", "model.safetensors": b"4", "README.md": card, "train_gpt.py": b""}
    revisions = {f"step{step}": {"model.safetensors": b"%d" % min(step, 3)} for step in (1, 2, 3, 4)}
    with served(Hub({"main": files, **revisions})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        result = CliRunner().invoke(main, ["openness", "hub:owner/name", "--json"])
        hub.revisions = {**hub.revisions, "step4": {"model.safetensors": b"4"}}
        assert CliRunner().invoke(main, ["openness", "hub:owner/name"]).exit_code == 0
    assert result.exit_code == 1, result.output
    found = json.loads(result.output)
    assert found["kind"] == "repository on the Hugging Face hub"
    items = {item["name"]: (item["status"], item["evidence"]) for item in found["items"]}
    assert list(items) == list(PREVENTS)
    assert items["licence"] == ("present", "apache-2.0")
    assert items["intermediate checkpoints"] == ("present", "4 revisions, 1 .. 4")
    assert items["training code"] == ("partial", "train_gpt.py")
    assert re.fullmatch(r"the same weights: step3 = step4 \(sha256 [0-9a-f]{12}\)", items["distinct revisions"][1])
