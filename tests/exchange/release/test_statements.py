"""Provenance statements follow from a release; verify derives them again."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from record_runs import done, weftrain

pytest.importorskip("securesystemslib", reason="securesystemslib is not installed: pip install 'weftrain[sign]'")


def test_statements(release: Path, tmp_path: Path) -> None:
    key, public, place = tmp_path / "key.pem", tmp_path / "key.pem.pub", tmp_path / "statements"
    signed = weftrain("sign", release, "--new-key", "--key", key, "--statements", place)
    assert f"{place}: 3 statements" in done(signed)
    assert "3 provenance statements" in done(weftrain("verify", release, "--key", public, "--statements", place))
    file = place / "ckpt_002.intoto.json"
    envelope = json.loads(file.read_bytes())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    build = statement["predicate"]["buildDefinition"]
    assert (build["externalParameters"]["first_step"], build["externalParameters"]["stop_step"]) == (2, 4)
    files = {
        name: entry["sha256"] for name, entry in json.loads((release / "release.json").read_bytes())["files"].items()
    }
    for one in (*statement["subject"], *build["resolvedDependencies"]):
        assert files[one["name"]] == one["digest"]["sha256"]
    assert {one["name"].split("/")[1] for one in statement["subject"]} == {"step_00000004", "ckpt_002"}
    assert {one["name"].split("/")[1] for one in build["resolvedDependencies"]} == {"step_00000002", "words"}

    def refused(*options: object) -> str:
        result = weftrain("verify", release, "--statements", place, *options)
        assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output
        return str(result.output)

    done(weftrain("sign", "--new-key", "--key", tmp_path / "other.pem"))
    (release / "model.sig").unlink()
    done(weftrain("sign", release, "--key", tmp_path / "other.pem"))
    assert "is not signed by the key" in refused("--key", tmp_path / "other.pem.pub")
    statement["predicate"]["runDetails"]["builder"]["id"] = "urn:another"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    file.write_text(json.dumps(envelope))
    assert "does not follow from the release's ledger" in refused()
    file.write_text("[]")
    assert "no DSSE envelope" in refused()
    file.unlink()
    assert "ckpt_002.intoto.json: is missing" in refused()
    again = weftrain("sign", release, "--key", key, "--statements", release / "statements")
    assert "lies in the release" in again.output
