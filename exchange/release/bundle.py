"""Signs a release as a Sigstore bundle, and checks one: the format of OpenSSF Model Signing, with which other programs
verify it, by the `model-signing` package. Keys are files; nothing asks a network.

model.sig holds a DSSE envelope of an in-toto statement with the SHA-256 of every file, release.json among them. The
signature is ECDSA on P-256, P-384 or P-521 by a key, by a certificate whose chain it holds, or by one that a Sigstore
gave an identity (keyless.py). A bundle does not hold the public key: without it (`--key`), the root of the certificates
(`--root`), or the trust root of that Sigstore (`--trusted-root`), the signer is unknown.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from weftrain.core.errors import ReleaseError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.exchange.release.keyless import IdentityTrust, check_identity, identity_of, is_keyless
from weftrain.exchange.release.release import BUNDLE, RELEASE, SIGNATURE, Release

_EXTRA = "bundles need the package `model-signing`: pip install 'weftrain[sign]'"
_FORM = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [BUNDLE, SIGNATURE]}
_STATEMENT = "https://model_signing/signature/v1.0"
_REMEDY = "fetch the release again, or have it signed again"
_MOST_CERTIFICATES = 16


@dataclass(frozen=True)
class Trust:
    """What the reader knows: the signer's public key in PEM, root certificates in PEM, or an identity that a Sigstore
    certified.
    """

    key: Path | None = None
    roots: tuple[Path, ...] = ()
    identity: IdentityTrust | None = None

    def __str__(self) -> str:
        identity = None if self.identity is None else self.identity.identity or self.identity.root
        return ", ".join(str(one) for one in (self.key, *self.roots, identity) if one is not None)


@dataclass(frozen=True)
class Signer:
    """known: the signature was checked with what the reader trusts. name: of the key or certificate, to show."""

    name: str
    known: bool


def sign_bundle(folder: Path, release: Release, key: Path) -> str:
    """Write model.sig of a verified release with a private key in PEM; returns the key's identifier, the SHA-256 of
    the public key in PEM. Raises ReleaseError.
    """
    target = folder / BUNDLE
    temporary = fsops.temporary_beside(target)
    read_plain(key, "key")  # a plain file of a key's size
    with _errors(target, f"{key}: is it an unencrypted EC key (P-256, P-384, P-521) in PEM?"):
        config = _library("signing").Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_verified_hashes(folder, release)).sign(folder, temporary)
        data = temporary.read_bytes()
        temporary.unlink()
        fsops.write_bytes(target, data)
    return str(_parsed(target)["verificationMaterial"]["publicKey"]["hint"])


def check_bundle(folder: Path, release: Release, trust: Trust) -> Signer:
    """Who signed. The statement must name every file of the release with its hash, whoever the signer is; the signature
    is checked with what is trusted. Raises ReleaseError.
    """
    path = folder / BUNDLE
    bundle = _parsed(path)
    _check_statement(path, bundle, _hashes(folder, release))
    material = bundle["verificationMaterial"]
    if "publicKey" in material:
        hint = material["publicKey"].get("hint") or "without a name"
        if trust.key is None:
            return Signer(f"key {str(hint)[:64]}", known=False)
        with _errors(path, f"it is not signed by the key in {trust.key}, or was altered: {_REMEDY}"):
            config = _library("verifying").Config().use_elliptic_key_verifier(public_key=trust.key)
            config.set_hashing_config(_verified_hashes(folder, release)).verify(folder, path)
        return Signer(f"key {str(hint)[:64]}", known=True)
    if is_keyless(material):
        if trust.identity is None:
            return Signer(str(identity_of(path, material)), known=False)
        name = str(check_identity(path, bundle, trust.identity))
        whose = "" if trust.identity.identity is not None else " (whose that is must be known from elsewhere)"
        return Signer(f"{name}{whose}", known=True)
    return _check_certificates(folder, release, trust, material.get("x509CertificateChain"))


def _check_certificates(folder: Path, release: Release, trust: Trust, chain: Any) -> Signer:
    path = folder / BUNDLE
    certificates = _certificates(path, chain)
    name = f"certificate of {certificates[0].subject.rfc4514_string()[:120]}"
    if not trust.roots:
        return Signer(name, known=False)
    now = datetime.datetime.now(datetime.UTC)
    for one in certificates:
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise ReleaseError(
                f"{path}: the certificate of {one.subject.rfc4514_string()[:120]} is valid from "
                f"{one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}, and nothing in the bundle "
                "shows that it was signed then: have it signed again"
            )
    with _errors(path, f"its certificates do not lead to {', '.join(map(str, trust.roots))}, or it was altered"):
        config = _library("verifying").Config().use_certificate_verifier(certificate_chain=list(trust.roots))
        config.set_hashing_config(_verified_hashes(folder, release)).verify(folder, path)
    return Signer(name, known=True)


def _certificates(path: Path, chain: Any) -> list[Any]:
    from cryptography import x509

    try:
        found = [base64.b64decode(one["rawBytes"], validate=True) for one in chain["certificates"]]
        if not 0 < len(found) <= _MOST_CERTIFICATES:
            raise ValueError(f"holds {len(found)} certificates")
        return [x509.load_der_x509_certificate(one) for one in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ReleaseError(f"{path}: its certificates cannot be read: {one_line(error, 120)}: {_REMEDY}") from error


def _parsed(path: Path) -> dict[str, Any]:
    """A bundle with the parts that this module reads. Raises ReleaseError."""
    try:
        bundle = parse_json(read_plain(path, "release", follow=False))
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        if not isinstance(material, dict) or not isinstance(material.get("publicKey", {}), dict):
            raise ValueError("its verificationMaterial is no object")
        base64.b64decode(envelope["payload"], validate=True)
        base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        return dict(bundle)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ReleaseError(f"{path}: is no Sigstore bundle: {one_line(error, 120)}: {_REMEDY}") from error


def _check_statement(path: Path, bundle: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """The signed statement names exactly the files that are here, with their hashes."""
    try:
        statement = parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        if statement["predicateType"] != _STATEMENT:
            raise ValueError(f"is a statement of {str(statement['predicateType'])[:80]!r}")
        found = {}
        for one in statement["predicate"]["resources"]:
            if one["algorithm"] != "sha256":
                raise ValueError(f"names files by {str(one['algorithm'])[:40]!r}, not by SHA-256 of whole files")
            found[str(one["name"])] = str(one["digest"])
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise ReleaseError(f"{path}: {one_line(error, 160)}: {_REMEDY}") from error
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            what = "does not name" if name not in found else "names, and it is not here," if name not in wanted else ""
            raise ReleaseError(f"{path}: {what or 'has another hash of'} {name[:120]}: it is of another release")


def _hashes(folder: Path, release: Release) -> dict[str, str]:
    """Every file of a verified release with its SHA-256, which were read already."""
    return {name: entry.sha256 for name, entry in release.files.items()} | {
        RELEASE: hashlib.sha256(read_plain(folder / RELEASE, "release", follow=False)).hexdigest()
    }


def _verified_hashes(folder: Path, release: Release) -> Any:
    """The hashes as the library's configuration takes them, so that no byte is read again."""
    hashing, manifest = _library("hashing"), _library("manifest")
    digest = _library("_hashing.hashing").Digest
    form = manifest.SerializationType.from_args(_FORM)
    items = [
        manifest.FileManifestItem(path=PurePosixPath(name), digest=digest("sha256", bytes.fromhex(sha256)))
        for name, sha256 in _hashes(folder, release).items()
    ]
    known = manifest.Manifest(release.name, items, form)

    class Known(hashing.Config):  # type: ignore[misc, name-defined]
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return known

    return Known()


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise ReleaseError(_EXTRA) from error


@contextlib.contextmanager
def _errors(path: Path, problem: str) -> Iterator[None]:
    """Whatever the library raises or prints becomes one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ReleaseError:
        raise
    except Exception as error:  # of OpenSSL, cryptography, pydantic and the library itself
        raise ReleaseError(f"{path}: {problem} ({type(error).__name__}: {one_line(error, 120)})") from error
