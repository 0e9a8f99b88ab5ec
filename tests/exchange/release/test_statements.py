"""Provenance statements follow from a release; verify derives them again."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from record_runs import done, weftrain

from weftrain.cli.verify import verified_release
from weftrain.core.errors import ReleaseError
from weftrain.exchange.release.statements import check_statements, write_statements

pytest.importorskip("securesystemslib", reason="securesystemslib is not installed: pip install 'weftrain[sign]'")


def claim_of(release: Path, *options: object) -> dict[str, str]:
    found = json.loads(done(weftrain("verify", release, "--json", *options)))["claims"]
    return next(claim for claim in found if claim["name"] == "statements of provenance")


def test_statements(release: Path, tmp_path: Path) -> None:
    key, public, place = tmp_path / "key.pem", tmp_path / "key.pem.pub", tmp_path / "statements"
    signed = weftrain("sign", release, "--new-key", "--key", key, "--statements", place)
    assert f"{place}: 3 statements" in done(signed)
    assert claim_of(release, "--key", public, "--statements", place)["cover"] == "signature"
    unnamed = claim_of(release, "--statements", place)
    assert unnamed["cover"] == "derivation"
    assert "signed by a key that you did not name" in unnamed["detail"]
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
    first = place / "ckpt_001.intoto.json"
    signed_one = first.read_bytes()
    first.write_text(json.dumps(json.loads(signed_one) | {"signatures": []}))
    assert "1 of them are not signed" in claim_of(release, "--statements", place)["detail"]
    assert "(nobody signed it)" in refused("--key", tmp_path / "other.pem.pub")
    first.write_bytes(signed_one)
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


def test_a_key_that_is_gone_or_is_none_is_one_line(release: Path, tmp_path: Path) -> None:
    """The file may vanish between the look at it and the statements, so that they read it themselves."""
    verified = verified_release(release)
    place = tmp_path / "statements"
    done(weftrain("sign", "--new-key", "--key", tmp_path / "key.pem"))
    write_statements(release, verified.release, place, tmp_path / "key.pem")
    (tmp_path / "prose.pub").write_text("-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----\n")
    for name in ("gone.pub", "prose.pub", "key.pem"):
        with pytest.raises(ReleaseError, match=rf"{name}: cannot be read as a public key in PEM") as caught:
            check_statements(release, verified.release, place, tmp_path / name)
        assert "\n" not in str(caught.value)
