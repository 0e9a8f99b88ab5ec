"""`weftrain publish`: to a hub-like server by the hub's own client, to a folder, and what was interrupted or is foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, served
from object_store import bucket as bucket
from object_store import server as server
from record_runs import done, weftrain

from weftrain.exchange.audit.audit import audit
from weftrain.exchange.audit.hub import HubSeries

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # within the hub's client


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a store with a protocol of its own


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_branch_a_checkpoint_and_the_record_on_main(release: Path) -> None:
    revisions = {path.name: files_below(path) for path in sorted((release / "revisions").iterdir())}
    with served(Hub({"main": {".gitattributes": b"x"}}, exists=False)) as hub:
        publish = ("publish", release, "--to", "hub:owner/name", "--endpoint", hub.endpoint)
        planned = done(weftrain(*publish, "--dry-run"))
        assert "would be sent" in planned
        assert not any(line.startswith(("POST", "PUT")) for line in hub.asked)
        printed = done(weftrain(*publish, "--private"))
        assert "sent, and all files there are the release's" in " ".join(printed.split())
        for name, files in revisions.items():
            assert {path: data for path, data in hub.revisions[name].items() if path != ".gitattributes"} == files
        main = hub.revisions["main"]
        assert main["model.safetensors"] == revisions["ckpt_003"]["model.safetensors"]
        assert main["record/release.json"] == (release / "release.json").read_bytes()
        assert not any(path.startswith(("record/checkpoints", "record/data")) for path in main)
        found = audit(HubSeries("hub:owner/name", hub.endpoint), "deep")
        assert (found.findings, found.revisions) == ((), tuple(revisions))
        hub.asked.clear()
        assert ": 0 files" in done(weftrain(*publish))
        assert not any(line.startswith(("POST", "PUT")) for line in hub.asked)
        # one more checkpoint: its branch begins as main is, and main's record goes from it
        del hub.revisions["ckpt_002"]  # type: ignore[attr-defined]
        done(weftrain(*publish))
        assert set(hub.revisions["ckpt_002"]) - {".gitattributes"} == set(revisions["ckpt_002"])


def test_an_interrupted_one_continues_and_a_damaged_file_is_sent_again(release: Path) -> None:
    failing: list[str] = []

    def faults(path: str, count: int) -> int | None:
        if path.startswith("PUT") and (failing or any(line.startswith("PUT") for line in hub.asked[:-1])):
            failing.append(path)
            return 403
        return None

    with served(Hub({"main": {}}, faults=faults)) as hub:
        publish = ("publish", release, "--to", "hub:owner/name", "--endpoint", hub.endpoint)
        refused = weftrain(*publish)
        assert refused.exit_code == 2
        assert "it continues where it stopped" in refused.output
        assert "secret" not in refused.output
        hub.faults = lambda path, count: None
        hub.asked.clear()
        done(weftrain(*publish))
        assert sum(line.startswith("PUT") for line in hub.asked) == 2  # of three; the first is there
        hub.revisions["ckpt_001"]["config.json"] = b"{}"  # type: ignore[index]
        assert "1 files" in done(weftrain(*publish))
        hub.revisions["main"]["theirs.bin"] = b"x"  # type: ignore[index]
        foreign = weftrain(*publish)
        assert (foreign.exit_code, "theirs.bin, which is no file of this release" in foreign.output) == (2, True)


def test_to_a_folder(release: Path, tmp_path: Path) -> None:
    place = tmp_path / "my shelf" / "mine"
    publish = ("publish", release, "--to", place)
    done(weftrain(*publish, "--dry-run"))
    assert not place.exists()
    done(weftrain(*publish))
    assert files_below(place) == files_below(release)
    done(weftrain("verify", place))
    assert ": 0 files" in done(weftrain(*publish))
    card = place / "README.md"
    card.write_bytes(card.read_bytes()[::-1])  # of the same size
    (place / "ledger.jsonl").unlink()
    assert ": 2 files" in done(weftrain(*publish))
    assert files_below(place) == files_below(release)
    (place / "other.txt").write_text("x")
    refused = weftrain(*publish)
    assert (refused.exit_code, "other.txt, which is no file of this release" in refused.output) == (2, True)


def test_to_a_bucket(release: Path, bucket: Any) -> None:
    publish = ("publish", release, "--to", "s3://shelf/mine")
    done(weftrain(*publish))
    found = {name.removeprefix("shelf/mine/"): bucket.cat_file(name) for name in bucket.find("shelf/mine")}
    assert found == files_below(release)
    bucket.pipe_file("shelf/mine/README.md", found["README.md"][::-1])
    bucket.rm_file("shelf/mine/revisions/ckpt_002/config.json")
    assert ": 2 files" in done(weftrain(*publish))
    assert ": 0 files" in done(weftrain(*publish, "--dry-run"))


def test_what_is_refused(release: Path, tmp_path: Path) -> None:
    assert "--private has no effect" in weftrain("publish", release, "--to", tmp_path / "x", "--private").output
    assert "name it as hub:owner/name" in weftrain("publish", release, "--to", "hub:a/b/c").output
    record = json.loads((release / "release.json").read_text())
    record["name"] = "another"
    (release / "release.json").write_text(json.dumps(record))
    result = weftrain("publish", release, "--to", tmp_path / "x")
    assert (result.exit_code, (tmp_path / "x").exists()) == (2, False)
