"""Who signed a release without a key: the identity that a Sigstore certified, checked without a network."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from forgery import write_release
from record_runs import done, weftrain

pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'weftrain[sign]'")
pytest.importorskip("sigstore", reason="sigstore is not installed: pip install 'weftrain[sign]'")
from own_sigstore import TEN_MINUTES, Sigstore

WHO, BY = "ada@example.org", "https://accounts.example.org"
OTHER = "eve@example.org"


@pytest.fixture(scope="module")
def own() -> Sigstore:
    return Sigstore()


@pytest.fixture(scope="module")
def payload(made: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The statement that names every file, from a bundle that a key signed."""
    folder = tmp_path_factory.mktemp("keyless")
    release = Path(shutil.copytree(made / "release", folder / "release"))
    done(weftrain("sign", release, "--new-key", "--key", folder / "key.pem"))
    return base64.b64decode(json.loads((release / "model.sig").read_bytes())["dsseEnvelope"]["payload"])


@pytest.fixture
def root(own: Sigstore, tmp_path: Path) -> Path:
    return own.write_trusted_root(tmp_path / "trusted_root.json")


def refused(release: Path, *options: Any) -> str:
    result = weftrain("verify", release, *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return str(line)


def model_signing_verifies(release: Path, *options: Any) -> None:
    """The other program's own command."""
    command = pytest.importorskip("model_signing._cli").main
    words = ["verify", "sigstore", str(release), "--signature", str(release / "model.sig"), *map(str, options)]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output


def test_the_identity_and_its_issuer_are_named_and_checked(
    own: Sigstore, payload: bytes, release: Path, root: Path, tmp_path: Path
) -> None:
    (release / "model.sig").write_text(json.dumps(own.bundle(payload, WHO, BY)))
    told = json.loads(done(weftrain("verify", release, "--json")))
    assert told["bundle"] == {"name": f"identity {WHO} of {BY}", "known": False}
    expected = ("--identity", WHO, "--issuer", BY)
    config = own.write_trusted_root(tmp_path / "config.json", within=True)
    model_signing_verifies(release, "--trust_config", config, *expected[:2], "--identity_provider", BY)
    for file in (root, config):
        told = json.loads(done(weftrain("verify", release, "--trusted-root", file, *expected, "--json")))
        claim = next(claim for claim in told["claims"] if claim["name"] == "who made it")
        assert (told["bundle"]["known"], claim["cover"]) == (True, "signature")
    assert f"identity {WHO} of {BY} (whose that is must be known from elsewhere)" in done(
        weftrain("verify", release, "--trusted-root", root)
    )
    line = refused(release, "--trusted-root", root, "--identity", OTHER, "--issuer", BY)
    assert f"is signed by identity {WHO} of {BY}, not by identity {OTHER} of {BY}" in line
    line = refused(release, "--trusted-root", root, "--identity", WHO, "--issuer", "https://other.example.org")
    assert "not by identity ada@example.org of https://other.example.org" in line
    stranger = Sigstore().write_trusted_root(tmp_path / "stranger.json")
    assert f"does not lead to {stranger}, or was altered" in refused(release, "--trusted-root", stranger, *expected)
    assert "is no trust root of Sigstore" in refused(release, "--trusted-root", release / "release.json", *expected)
    assert "give its file with --trusted-root" in weftrain("verify", release, *expected).output
    assert "give both" in weftrain("verify", release, "--trusted-root", root, *expected[:2]).output


def test_a_certificate_that_had_expired_when_it_signed(
    own: Sigstore, payload: bytes, release: Path, root: Path
) -> None:
    for late in (TEN_MINUTES + datetime.timedelta(seconds=1), datetime.timedelta(seconds=-1)):
        (release / "model.sig").write_text(json.dumps(own.bundle(payload, WHO, BY, after=late)))
        line = refused(release, "--trusted-root", root)
        assert "model.sig: its certificate was valid from " in line
        assert f"entered the signature at {own.now + late:%Y-%m-%d %H:%M:%S}: have it signed again" in line


@pytest.mark.parametrize("time", ["of a timestamp", "of a timestamp, second log"])
def test_a_timestamp_says_when_where_the_log_does_not(
    time: Any, own: Sigstore, payload: bytes, release: Path, root: Path
) -> None:
    """As the second form of Sigstore's log has it: entries without a time, beside a timestamp of RFC 3161."""
    expected = ("--trusted-root", root, "--identity", WHO, "--issuer", BY)
    bundle = own.bundle(payload, WHO, BY, time=time)
    (release / "model.sig").write_text(json.dumps(bundle))
    assert json.loads(done(weftrain("verify", release, *expected, "--json")))["bundle"]["known"] is True
    stamps = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    other = base64.b64encode(own.timestamp(b"another signature", own.now)).decode()
    strange = base64.b64encode(Sigstore().timestamp(base64.b64decode(_signature(bundle)), own.now)).decode()
    for signed in (other, strange, "MAA="):
        stamps[0]["signedTimestamp"] = signed
        (release / "model.sig").write_text(json.dumps(bundle))
        assert "or was altered" in refused(release, *expected)
    del bundle["verificationMaterial"]["timestampVerificationData"]
    (release / "model.sig").write_text(json.dumps(bundle))
    assert "or was altered (InvalidBundle" in refused(release, *expected)
    late = own.bundle(payload, WHO, BY, after=TEN_MINUTES + datetime.timedelta(seconds=1), time=time)
    (release / "model.sig").write_text(json.dumps(late))
    assert "cert is not valid at validation time" in refused(release, *expected)


def _signature(bundle: dict[str, Any]) -> str:
    return str(bundle["dsseEnvelope"]["signatures"][0]["sig"])


def _other_text(bundle: dict[str, Any]) -> None:
    envelope = bundle["dsseEnvelope"]
    value = json.loads(base64.b64decode(envelope["payload"]))
    envelope["payload"] = base64.b64encode(json.dumps(value, indent=1).encode()).decode()


def _other_time(bundle: dict[str, Any]) -> None:
    (entry,) = bundle["verificationMaterial"]["tlogEntries"]
    entry["integratedTime"] = str(int(entry["integratedTime"]) + 1)


def _no_entry(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


def _no_promise(bundle: dict[str, Any]) -> None:
    del bundle["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]


def _no_certificate(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["certificate"] = {"rawBytes": "MAA="}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_text, "or was altered (VerificationError"),
        (_other_time, "or was altered (VerificationError"),
        (_no_promise, "or was altered (InvalidBundle"),
        (_no_entry, "holds no entry of a log that says when it was signed"),
        (_no_certificate, "its certificate cannot be read"),
    ],
)
def test_what_was_altered_is_one_line(
    damage: Any, words: str, own: Sigstore, payload: bytes, release: Path, root: Path
) -> None:
    bundle = own.bundle(payload, WHO, BY)
    damage(bundle)
    (release / "model.sig").write_text(json.dumps(bundle))
    assert words in refused(release, "--trusted-root", root)


def test_an_identity_of_another_release_and_one_where_a_key_signed(
    own: Sigstore, payload: bytes, release: Path, root: Path, tmp_path: Path
) -> None:
    (release / "analyses").mkdir()
    (release / "analyses" / "note.txt").write_text("another story")
    write_release(release)
    (release / "model.sig").write_text(json.dumps(own.bundle(payload, WHO, BY)))
    assert "does not name analyses/note.txt: it is of another release" in refused(release, "--trusted-root", root)
    (release / "model.sig").unlink()
    done(weftrain("sign", release, "--new-key", "--key", tmp_path / "key.pem"))
    line = refused(release, "--trusted-root", root, "--identity", WHO, "--issuer", BY)
    assert "signed by an unknown key" in line
    assert f"not by identity {WHO} of {BY}" in line
