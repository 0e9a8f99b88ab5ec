"""The audit of a hub-like server's series: each published kind of mistake is found, and a clean series has none."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hub_server import Hub, commit_of, served
from planted_series import CONFIG, PYTHIA_STEPS, clean, file_of, planted, revision, trained

from weftrain.core.errors import ReleaseError, RemoteError
from weftrain.exchange.audit.audit import Audit, Depth, audit, open_series, same_weights
from weftrain.exchange.audit.hub import HubSeries
from weftrain.exchange.audit.series import ListedFile, Revision, Series, revision_of


def audited(hub: Hub, depth: Depth = "headers") -> Audit:
    return audit(HubSeries("hub:owner/name", hub.endpoint, wait=lambda seconds: None), depth)


def of_kind(found: Audit, kind: str) -> list[tuple[tuple[str, ...], str]]:
    return [(one.revisions, one.evidence) for one in found.findings if one.kind == kind]


@pytest.fixture(scope="module")
def planted_audit() -> Iterator[tuple[Audit, Hub]]:
    with served(Hub(planted())) as hub:
        yield audited(hub, "deep"), hub


def test_every_published_kind_of_mistake_is_found_in_154_revisions(planted_audit: tuple[Audit, Hub]) -> None:
    found, hub = planted_audit
    assert len(found.revisions) == 154
    late, three = of_kind(found, "duplicate")
    assert late[0] == (*(f"step{step}" for step in range(1000, 87_000, 1000)), "step143500")
    assert "86 of 154 revisions serve the weights of step143500, the last one" in late[1]
    assert three[0] == ("step90000", "step91000", "step92000")
    assert of_kind(found, "gap") == [
        (("step94000", "step96000"), "step 95,000 is missing, 1 at a spacing of 1,000"),
    ]
    ((pair, _),) = of_kind(found, "out of order")
    assert pair == ("step99000-tokens207B", "step100000-tokens20B")
    ((pair, words),) = of_kind(found, "dtype change")
    assert pair == ("step109000", "step110000")
    assert "21 of 21 tensors change from F32 to BF16" in words
    configs = dict(of_kind(found, "config change"))
    assert configs["step114000", "step115000"] == "from step115000 on: rope_theta: 10000.0 -> 500000.0"
    ((names, words),) = of_kind(found, "config contradicted")
    assert names == ("step120000",)
    assert "model.embed_tokens.weight is [48, 16], the config makes it [50, 16]" in words
    for kind in ("norm jump", "movement jump"):
        ((pair, _),) = of_kind(found, kind)
        assert pair == ("step134000", "step135000")
    known = {"duplicate", "gap", "out of order", "dtype change", "config change", "config contradicted"}
    assert {one.kind for one in found.findings} == known | {"norm jump", "movement jump"}
    assert not any(path.endswith(".bin") for path in hub.asked)


def test_a_clean_series_has_no_finding_at_any_depth() -> None:
    with served(Hub(clean())) as hub:
        listing = audited(hub, "listing")
        assert (listing.findings, listing.revisions) == ((), tuple(f"step{step}" for step in PYTHIA_STEPS))
        assert not any("resolve" in path for path in hub.asked)
        found = audited(hub, "deep")
    assert found.findings == ()
    assert ("main", "has the weights of step143000") in {(fact.name, fact.evidence) for fact in found.facts}
    assert {point.step for point in found.points if point.norm} == set(PYTHIA_STEPS)


def test_listings_alone_find_what_hashes_and_names_show() -> None:
    with served(Hub(planted())) as hub:
        found = audited(hub, "listing")
        assert len(hub.asked) == 155
    assert {one.kind for one in found.findings} == {"duplicate", "gap", "out of order"}


def test_a_revision_that_vanishes_is_named_and_the_audit_goes_on() -> None:
    steps = [1000, 2000, 3000, 4000]
    gone = clean(steps)

    def faults(path: str, count: int) -> int | None:
        if "store" in path:
            return 404 if "/" + commit_of("step2000") in path else None
        return 404 if "tree" in path and commit_of("step3000") in path else None

    with served(Hub(gone, faults=faults)) as hub:
        found = audited(hub)
    vanished = of_kind(found, "vanished")
    assert [names for names, _ in vanished] == [("step2000",), ("step3000",)]
    assert all("is not there" in words for _, words in vanished)
    assert not any(f"{commit_of('step2000')}/config.json" in path for path in hub.asked)
    assert {one.kind for one in found.findings} == {"vanished"}


HOSTILE = {
    "claims a header of 18446744073709551615 bytes": b"\xff" * 8 + b"{}",
    "nested too deeply": (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995,
    "must be short lists of numbers from 0": b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
    "begins at byte": b'{"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "which is no safetensors file": b"\0\0",
    "appears twice": b'{"w":1,"w":2}',
    "is not words of letters": b'{"../../x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


def test_hostile_headers_are_a_line_each_and_take_no_memory() -> None:
    revisions = clean([1000, 2000, 3000])
    for index, (said, data) in enumerate(HOSTILE.items()):
        if said not in (
            "claims a header of 18446744073709551615 bytes",
            "nested too deeply",
            "which is no safetensors file",
        ):
            data = len(data).to_bytes(8, "little") + data + b"\0" * 4
        revisions[f"step{4000 + 1000 * index}"] = {**revisions["step1000"], "model.safetensors": data}
    revisions["step90000"] = {**revision(trained([7])[7]), "config.json": b"[" * 100_000}
    tracemalloc.start()
    with served(Hub(revisions)) as hub:
        found = audited(hub, "deep")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bad = [words for _, words in of_kind(found, "bad file")]
    for said in HOSTILE:
        assert sum(said in words for words in bad) >= 1, (said, bad)
    assert len(bad) == len(HOSTILE) + 1
    assert not any("\n" in words or len(words) > 500 for words in bad)
    assert peak_bytes < 64 << 20


def test_a_series_in_float8_is_read() -> None:
    header = b'{"w.weight":{"dtype":"F8_E4M3","shape":[2,4],"data_offsets":[0,8]}}'
    config = json.dumps({"model_type": "unheard_of"}).encode()
    revisions = {
        f"step{step}": {
            "config.json": config,
            "model.safetensors": len(header).to_bytes(8, "little") + header + bytes([step] * 8),
        }
        for step in (1, 2, 3)
    }
    with served(Hub(revisions)) as hub:
        assert audited(hub, "deep").findings == ()


def test_pickled_weights_are_compared_by_hash_and_never_read() -> None:
    steps = [1000, 2000, 3000]
    revisions = {
        f"step{step}": {
            "config.json": json.dumps(CONFIG).encode(),
            "pytorch_model.bin": b"\x80\x04" + bytes([step == 1000]),
        }
        for step in steps
    }
    with served(Hub(revisions)) as hub:
        found = audited(hub, "deep")
        assert not any("pytorch_model.bin" in path for path in hub.asked)
    assert [names for names, _ in of_kind(found, "duplicate")] == [("step2000", "step3000")]
    assert any("never loaded" in fact.evidence for fact in found.facts)


def test_folders_of_the_main_branch_are_revisions_where_no_branch_is() -> None:
    steps = [1000, 2000, 3000, 4000]
    files = {f"checkpoints/{name}/{path}": data for name, some in clean(steps).items() for path, data in some.items()}
    files["checkpoints/step3000/model.safetensors"] = files["checkpoints/step1000/model.safetensors"]
    with served(Hub({"main": {"README.md": b"", **files}})) as hub:
        found = audited(hub, "deep")
    assert found.revisions == tuple(f"checkpoints/step{step}" for step in steps)
    assert [names for names, _ in of_kind(found, "duplicate")] == [("checkpoints/step1000", "checkpoints/step3000")]
    assert len(found.findings) == 1
    assert {"headers", "config"} <= {fact.name for fact in found.facts if fact.status == "present"}


def test_shards_that_are_shared_or_missing() -> None:
    config = json.dumps(CONFIG).encode()
    weights = trained([1000, 2000, 3000])

    def shards(step: int, first: int) -> dict[str, bytes]:
        names = list(weights[step])
        halves = (names[:10], weights[first]), (names[10:], weights[step])
        return {"config.json": config} | {
            f"model-{number:05d}-of-00002.safetensors": file_of({name: some[name] for name in half})
            for number, (half, some) in enumerate(halves, 1)
        }

    revisions = {"step1000": shards(1000, 1000), "step2000": shards(2000, 1000), "step3000": shards(3000, 3000)}
    del revisions["step3000"]["model-00001-of-00002.safetensors"]
    with served(Hub(revisions)) as hub:
        found = audited(hub, "listing")
    ((names, words),) = of_kind(found, "near duplicate")
    assert names == ("step1000", "step2000")
    assert "1 of 2 files of weights are the same" in words
    assert [names for names, _ in of_kind(found, "incomplete")] == [("step3000",)]


def test_two_revisions_in_the_wrong_order_and_one_of_another_training() -> None:
    steps = list(range(1000, 31_000, 1000))
    revisions = clean(steps)
    del revisions["main"]
    revisions["step10000"], revisions["step11000"] = revisions["step11000"], revisions["step10000"]
    revisions["step20000"] = revision(trained([20_000], seed=5)[20_000])
    with served(Hub(revisions)) as hub:
        found = audited(hub, "deep")
    assert [names for names, _ in of_kind(found, "out of order")] == [("step10000", "step11000")]
    assert [names for names, _ in of_kind(found, "movement jump")] == [("step20000",)]


def test_values_that_are_not_finite_and_copies_in_another_dtype() -> None:
    weights = trained([1000, 2000, 3000, 4000])
    weights[2000]["model.norm.weight"][3] = float("nan")
    revisions = {f"step{step}": revision(some) for step, some in weights.items()}
    revisions["step4000"] = revision(weights[3000], "BF16", torch_dtype="bfloat16")
    with served(Hub(revisions)) as hub:
        found = audited(hub, "deep")
    assert [names for names, _ in of_kind(found, "not finite")] == [("step2000",)]
    assert [names for names, _ in of_kind(found, "near duplicate")] == [("step3000", "step4000")]


class Listed(Series):
    """A series of lists of files, made as they are asked for."""

    where = kind = "listed"

    def __init__(self, count: int) -> None:
        self._count = count

    def refs(self) -> list[str]:
        return [f"step{number * 1000}" for number in range(self._count)]

    def revision(self, name: str) -> Revision:
        files = [
            ListedFile(f"model-{part:05d}-of-00004.safetensors", 1 << 32, f"sha256:{name}{part:060d}")
            for part in range(1, 5)
        ]
        return revision_of(name, name, [*files, ListedFile("config.json", 600, "git:1")])

    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        raise AssertionError("listings alone")


def test_a_revision_takes_some_hundred_bytes_of_memory() -> None:
    """So that 10,000 revisions of four files take some tens of megabytes."""
    tracemalloc.start()
    found = audit(Listed(1000), "listing")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.findings == ()
    assert len(found.revisions) == 1000
    assert peak_bytes < 5_000_000


@pytest.mark.soak
def test_ten_thousand_revisions_of_a_server_take_less_than_a_minute() -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x"}
    with served(
        Hub({f"step{number}": {**files, "model.safetensors": b"%d" % number} for number in range(10_000)})
    ) as hub:
        index = {commit_of(name): one for name, one in hub.revisions.items()}
        hub.files = index.get  # type: ignore[method-assign, assignment]
        began_s = time.process_time()
        found = audited(hub, "listing")
        assert time.process_time() - began_s < 60
        assert len(found.revisions) == 10_000
    assert found.findings == ()


def test_what_is_no_series_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ReleaseError, match="holds no revision with a step"):
        audit(open_series(str(tmp_path)))
    with pytest.raises(ReleaseError, match="is no folder"):
        open_series(str(tmp_path / "nothing"))
    with served(Hub({"main": {}})) as hub, pytest.raises(ReleaseError, match="no revision with a step"):
        audited(hub)
    with served(Hub({"step1": {}, "step2": {}}, faults=lambda path, count: 500 if "tree" in path else None)) as hub:
        with pytest.raises(RemoteError, match="the hub answers HTTP 500"):
            audited(hub)
        with pytest.raises((ReleaseError, RemoteError), match="HTTP 500"):
            same_weights(HubSeries("hub:owner/name", hub.endpoint, wait=lambda seconds: None))
