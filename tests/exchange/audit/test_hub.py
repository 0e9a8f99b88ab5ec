"""The hub's client: pages, ranges, redirects, retries and refusals; the tests' server answers the hub's own client too."""

from __future__ import annotations

import pytest
from hub_server import Hub, served

from weftrain.core.errors import RemoteError
from weftrain.exchange.audit.hub import ATTEMPTS, HubSeries, is_hub
from weftrain.exchange.audit.series import VanishedError

DATA = bytes(range(256)) * 4


def series(hub: Hub, waits: list[float] | None = None, token: str | None = None) -> HubSeries:
    return HubSeries("hub:owner/name", hub.endpoint, token, wait=(waits if waits is not None else []).append)


def test_branches_pages_and_ranges() -> None:
    many = {f"logs/{number}.txt": b"x" for number in range(120)}
    hub = Hub(
        {"main": {}, "step1": {**many, "model.safetensors": DATA, "config.json": b"{}"}},
        tags={"step2": "step1", "v1": "step1"},
    )
    with served(hub):
        found = series(hub)
        assert found.refs() == ["main", "step1", "step2"]
        revision = found.revision("step1")
        assert [file.path for file in revision.weights] == ["model.safetensors"]
        assert revision.weights[0].identity.startswith("sha256:")
        assert revision.config is not None
        assert revision.config.identity.startswith("git:")
        assert found.read(revision, "model.safetensors", 10, 20) == DATA[10:20]
        assert found.read(revision, "model.safetensors", 5000, 5010) == b""
        hub.ranges = False
        assert found.read(revision, "model.safetensors", 10, 20) == DATA[10:20]
        assert found.revision("step2").identity == revision.identity


def test_a_token_goes_to_the_endpoint_alone() -> None:
    hub = Hub({"step1": {"model.safetensors": DATA}})
    with served(hub):
        found = series(hub, token="secret")
        found.refs()
        found.read(found.revision("step1"), "model.safetensors", 0, 8)
    assert len(hub.authorized) == 3
    assert not any(path.startswith("/store") for path in hub.authorized)


def test_what_may_pass_is_tried_again_and_what_does_not_is_said() -> None:
    waits: list[float] = []
    hub = Hub({"step1": {}}, faults=lambda path, count: 503 if count < 3 else None)
    with served(hub):
        assert series(hub, waits).refs() == ["step1"]
    assert len(waits) == 2
    for status, kind, said in (
        (503, RemoteError, "answers HTTP 503"),
        (401, RemoteError, "set HF_TOKEN"),
        (404, VanishedError, "check the name"),
    ):
        with served(Hub({}, faults=lambda path, count, status=status: status)) as refusing:  # type: ignore[misc]
            with pytest.raises(kind, match=said):
                series(refusing).refs()
            assert len(refusing.asked) == (ATTEMPTS if status == 503 else 1)
    with pytest.raises(RemoteError, match="cannot be fetched from"):
        series(refusing).refs()


def test_answers_that_are_not_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"step1": {}})
    monkeypatch.setattr(hub, "refs", lambda: ["no", "object"])
    with served(hub), pytest.raises(RemoteError, match="is no JSON object"):
        series(hub).refs()
    hub = Hub({"step1": {}, "step2": {}})
    strange = [None, 7, {"type": "file"}, {"type": "file", "path": "model.bin", "size": -1, "lfs": {"oid": "x"}}]
    with served(hub):
        found = series(hub)
        monkeypatch.setattr(hub, "refs", lambda: {"branches": [{"name": 1}, {"name": "a", "targetCommit": "../.."}, 3]})
        assert found.refs() == []
        monkeypatch.undo()
        found.refs()
        monkeypatch.setattr(hub, "listing", lambda files: strange)
        (file,) = found.revision("step1").weights
        assert (file.size, file.identity) == (0, "")
        monkeypatch.setattr("weftrain.exchange.audit.hub._MAX_PAGE_BYTES", 8)
        assert found.revision("step1").weights == (file,)  # a commit's list is asked for once
        with pytest.raises(RemoteError, match="is larger than the 8 bytes"):
            found.revision("step2")


@pytest.mark.parametrize("name", ["hub:", "hub:a/b/c", "hub:../x", "hub:a b/c", "hub:a/b?c"])
def test_what_is_no_repository_is_refused(name: str) -> None:
    assert is_hub(name)
    with pytest.raises(RemoteError, match="hub:owner/name"):
        HubSeries(name)
    with pytest.raises(RemoteError, match="endpoint"):
        HubSeries("hub:owner/name", "file:///etc")


def test_the_hubs_own_client_reads_the_tests_server() -> None:
    """So the server answers as the hub does, as far as that client looks."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    many = {f"logs/{number}.txt": b"x" for number in range(60)}
    with served(Hub({"main": {}, "step1": {**many, "model.safetensors": DATA}})) as hub:
        client = huggingface_hub.HfApi(endpoint=hub.endpoint, token=False)
        assert [branch.name for branch in client.list_repo_refs("owner/name").branches] == ["main", "step1"]
        files = list(client.list_repo_tree("owner/name", revision="step1", recursive=True))
        found = series(hub)
        found.refs()
        (own,) = found.revision("step1").weights
    (theirs,) = [file for file in files if file.path == "model.safetensors"]
    assert (f"sha256:{theirs.lfs.sha256}", theirs.size) == (own.identity, own.size)
