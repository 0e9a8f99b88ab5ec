"""Signing a release and checking who signed it: bundles that other programs read, and signatures of earlier versions."""

from __future__ import annotations

import base64
import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from forgery import write_release
from record_runs import done, weftrain

from weftrain.core.formats.canonical import canonical_json

pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'weftrain[sign]'")


def refused(release: Path, *options: Any) -> str:
    result = weftrain("verify", release, *options)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return str(line)


def old_key(path: Path) -> str:
    """An Ed25519 key, with which earlier versions signed; its public key in hexadecimal."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    return key.public_key().public_bytes_raw().hex()


def test_signatures_of_earlier_versions(release: Path, tmp_path: Path) -> None:
    public, stranger = old_key(tmp_path / "key.pem"), old_key(tmp_path / "other.pem")
    assert public in done(weftrain("sign", release, "--key", tmp_path / "key.pem"))
    assert f"signed by {public}" in done(weftrain("verify", release))
    done(weftrain("verify", release, "--key", public))
    assert f"signed by {public}, not by {stranger}" in refused(release, "--key", stranger)
    signature = json.loads((release / "signature.json").read_bytes())
    (release / "signature.json").write_bytes(canonical_json(signature | {"public_key": stranger}))
    assert "the signature is not valid" in refused(release)
    (release / "signature.json").write_bytes(canonical_json(signature))
    (release / "analyses").mkdir()
    (release / "analyses" / "note.txt").write_text("another story")
    write_release(release)  # consistent, but of another root
    assert "is of another root" in refused(release)
    assert "is no unencrypted private key" in weftrain("sign", release, "--key", release / "README.md").output
    assert "is neither an Ed25519 key in hexadecimal" in refused(release, "--key", release / "README.md")


def model_signing(*words: Any) -> str:
    """The other program's own command."""
    command = pytest.importorskip("model_signing._cli", reason="model-signing is not installed")
    result = CliRunner().invoke(command.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_bundle_is_read_by_others_and_theirs_by_us(release: Path, tmp_path: Path) -> None:
    key, bundle = tmp_path / "key.pem", release / "model.sig"
    public, others = tmp_path / "key.pem.pub", tmp_path / "other.pem.pub"
    assert str(public) in done(weftrain("sign", "--new-key", "--key", key))
    done(weftrain("sign", "--new-key", "--key", tmp_path / "other.pem"))
    assert os.stat(key).st_mode & 0o777 == 0o600
    assert "is there already" in weftrain("sign", "--new-key", "--key", key).output
    old_key(tmp_path / "old.pem")
    done(weftrain("sign", release, "--key", tmp_path / "old.pem"))  # both kinds beside each other
    done(weftrain("sign", release, "--key", key))
    model_signing("verify", "key", release, "--signature", bundle, "--public_key", public)
    (release / "signature.json").unlink()
    for _ in ("ours", "theirs"):
        told = done(weftrain("verify", release))
        assert "signed by an unknown key" in told
        assert "who made it" in told
        fields = json.loads(done(weftrain("verify", release, "--key", public, "--json")))
        assert fields["bundle"]["known"] is True
        claim = next(claim for claim in fields["claims"] if claim["name"] == "who made it")
        assert claim["cover"] == "signature"
        assert "is not signed by the key" in refused(release, "--key", others)
        bundle.unlink()
        model_signing("sign", "key", release, "--signature", bundle, "--private_key", key)
    signed = json.loads(bundle.read_bytes())
    signature = signed["dsseEnvelope"]["signatures"][0]
    raw = bytearray(base64.b64decode(signature["sig"]))
    raw[-1] ^= 1
    signature["sig"] = base64.b64encode(raw).decode()
    bundle.write_text(json.dumps(signed))
    assert "or was altered" in refused(release, "--key", public)
    bundle.unlink()
    assert "not signed, not by" in refused(release, "--key", public)


def test_a_bundle_of_another_release_is_refused_without_a_key(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    done(weftrain("sign", release, "--new-key", "--key", tmp_path / "key.pem"))
    (release / "analyses").mkdir()
    (release / "analyses" / "note.txt").write_text("another story")
    write_release(release)
    assert "model.sig: does not name analyses/note.txt: it is of another release" in refused(release)
    (release / "analyses" / "note.txt").unlink()
    (release / "analyses").rmdir()
    value = json.loads((release / "model.sig").read_bytes())
    payload = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    payload["predicateType"] = "https://example.org/else"
    value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (release / "model.sig").write_text(json.dumps(value))
    write_release(release)
    assert "is a statement of 'https://example.org/else'" in refused(release)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"verificationMaterial":[],"dsseEnvelope":{}}',
        b'{"verificationMaterial":{"publicKey":7},"dsseEnvelope":{"payload":"e30=","signatures":[{"sig":""}]}}',
        b'{"verificationMaterial":{},"dsseEnvelope":{"payload":"!","signatures":[]}}',
        b'{"verificationMaterial":{},"dsseEnvelope":{"payload":"e30=","signatures":[{"sig":""}]}}',
        b'{"verificationMaterial":{},"dsseEnvelope":{"payload":"W10=","signatures":[{"sig":""}]}}',
        b"[" * 100_000,
    ],
)
def test_garbage_is_one_line(text: bytes, tmp_path: Path) -> None:
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.bundle import _check_statement, _parsed

    path = tmp_path / "model.sig"
    path.write_bytes(text)
    with pytest.raises(ReleaseError) as error:
        _check_statement(path, _parsed(path), {})
    assert "model.sig: " in str(error.value)
    assert "\n" not in str(error.value)


def certificate(folder: Path, name: str, issuer: Any = None, days: int = 30) -> Any:
    """A certificate and its key, valid until so many days from now; of itself, or by another one and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string(f"CN={name}")
    signer, by = (key, subject) if issuer is None else (issuer[1], issuer[0].subject)
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"], False
    ) | {"decipher_only": False, "crl_sign": False, "key_cert_sign": issuer is None, "digital_signature": True}
    made = (
        x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(end - datetime.timedelta(days=60))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(issuer is None, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{name}.crt").write_bytes(made.public_bytes(form.Encoding.PEM))
    (folder / f"{name}.pem").write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    return made, key


def test_certificates(release: Path, tmp_path: Path) -> None:
    root = certificate(tmp_path, "root")
    certificate(tmp_path, "other")
    for name, days in (("leaf", 30), ("expired", -1)):
        certificate(tmp_path, name, root, days)
        key = ("--private_key", tmp_path / f"{name}.pem", "--signing_certificate", tmp_path / f"{name}.crt")
        chain = ("--certificate_chain", tmp_path / "root.crt")
        model_signing("sign", "certificate", release, "--signature", release / "model.sig", *key, *chain)
        assert f"signed by an unknown certificate of CN={name}" in done(weftrain("verify", release))
        if name == "leaf":
            told = done(weftrain("verify", release, "--root", tmp_path / "root.crt"))
            assert "signed by certificate of CN=leaf" in told
            assert "its certificates do not lead to" in refused(release, "--root", tmp_path / "other.crt")
        else:
            assert "the certificate of CN=expired is valid from" in refused(release, "--root", tmp_path / "root.crt")
    value = json.loads((release / "model.sig").read_bytes())
    value["verificationMaterial"]["x509CertificateChain"]["certificates"] = [{"rawBytes": "MAA="}]
    (release / "model.sig").write_text(json.dumps(value))
    assert "its certificates cannot be read" in refused(release)
