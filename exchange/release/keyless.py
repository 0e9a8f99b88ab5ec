"""Checks a bundle that was signed without a key of its own: Sigstore certified an identity, such as an address of mail
or a workflow, for some minutes, and its log entered the signature within them.

Making one takes a network; checking one takes the certificates and keys of that Sigstore, its trust root, as a file:
`trusted_root.json`, or the trust configuration that holds it, as https://github.com/sigstore/root-signing has those of
the public one. Nothing here asks a network. The `sigstore` package checks the chain of the certificate, its entry in
the log of certificates, the inclusion of the signature in the log, and the signature.

https://docs.sigstore.dev/about/bundle/
"""

from __future__ import annotations

import base64
import datetime
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import read_plain

_ISSUER = "1.3.6.1.4.1.57264.1.1"  # Sigstore's extension of a certificate
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_EXTRA = "signatures by an identity need the package `sigstore`: pip install 'weftrain[sign]'"
_REMEDY = "fetch the release again, or have it signed again"


@dataclass(frozen=True)
class Identity:
    """Whom a certificate names, and which provider of identities vouched for that."""

    name: str
    issuer: str

    def __str__(self) -> str:
        return f"identity {self.name[:160]} of {self.issuer[:160]}"


@dataclass(frozen=True)
class IdentityTrust:
    """The file of the trust root, and who must have signed; None: anyone whom that Sigstore certified."""

    root: Path
    identity: Identity | None = None


def is_keyless(material: Mapping[str, Any]) -> bool:
    """Whether a bundle's verificationMaterial is of an identity: it holds one certificate, or entries in a log."""
    return "certificate" in material or bool(material.get("tlogEntries"))


def identity_of(path: Path, material: Mapping[str, Any]) -> Identity:
    """Whom the certificate of a bundle names, checked or not. Raises ReleaseError for one that names none."""
    from cryptography import x509

    certificate = _certificate(path, material)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = [
            *names.get_values_for_type(x509.RFC822Name),
            *names.get_values_for_type(x509.UniformResourceIdentifier),
        ]
        return Identity(_shown(known[0]), _shown(_issuer(certificate)))
    except (x509.ExtensionNotFound, ValueError, IndexError) as error:
        raise ReleaseError(f"{path}: its certificate names no identity of Sigstore: {_REMEDY}") from error


def _shown(text: str) -> str:
    """Raises ValueError for what would not be shown as it is."""
    if not text.isprintable():
        raise ValueError("holds characters that cannot be shown")
    return text


def _issuer(certificate: Any) -> str:
    """Raises ValueError where the certificate names none."""
    values = {one.oid.dotted_string: one.value for one in certificate.extensions}
    if (found := values.get(_ISSUER)) is None:
        raise ValueError("no issuer")
    return str(found.value.decode())


def _certificate(path: Path, material: Mapping[str, Any]) -> Any:
    from cryptography import x509

    try:
        held = (
            material["certificate"]
            if "certificate" in material
            else material["x509CertificateChain"]["certificates"][0]
        )
        return x509.load_der_x509_certificate(base64.b64decode(held["rawBytes"], validate=True))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ReleaseError(f"{path}: its certificate cannot be read: {one_line(error, 120)}: {_REMEDY}") from error


def check_identity(path: Path, bundle: Mapping[str, Any], trust: IdentityTrust) -> Identity:
    """The identity that signed, by the trust root. The caller compares the signed statement with the release. Raises
    ReleaseError where it is another than the one expected, where the certificate had expired when the log entered the
    signature, or where anything does not lead to the trust root.
    """
    material = bundle["verificationMaterial"]
    found = identity_of(path, material)
    if trust.identity is not None and found != trust.identity:
        raise ReleaseError(f"{path}: is signed by {found}, not by {trust.identity}: fetch it from whoever that is")
    _check_in_time(path, material)
    models, verify = _library("sigstore.models"), _library("sigstore.verify")
    root = _trusted_root(trust.root)
    try:
        policy = verify.policy.Identity(identity=found.name, issuer=found.issuer)
        parsed = models.Bundle.from_json(json.dumps(bundle))
        kind, payload = verify.Verifier(trusted_root=root).verify_dsse(bundle=parsed, policy=policy)
        if kind != _PAYLOAD_TYPE or payload != base64.b64decode(bundle["dsseEnvelope"]["payload"]):
            raise ValueError(f"what is signed is no statement but {kind[:80]!r}")
    except Exception as error:  # of sigstore, cryptography, pydantic and rfc3161-client
        raise ReleaseError(
            f"{path}: the signature of {found} does not lead to {trust.root}, or was altered "
            f"({type(error).__name__}: {one_line(error, 160)}): {_REMEDY}"
        ) from error
    return found


def _check_in_time(path: Path, material: Mapping[str, Any]) -> None:
    """Raises ReleaseError for a certificate that had expired, or was not valid yet, when the log entered the signature.
    An entry without a time has timestamps, which sigstore checks.
    """
    certificate = _certificate(path, material)
    try:
        seconds = int(material["tlogEntries"][0].get("integratedTime") or 0)
        entered = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, OSError) as error:
        raise ReleaseError(f"{path}: holds no entry of a log that says when it was signed: {_REMEDY}") from error
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if seconds and not first <= entered <= last:
        raise ReleaseError(
            f"{path}: its certificate was valid from {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}, and the "
            f"log entered the signature at {entered:%Y-%m-%d %H:%M:%S}: have it signed again"
        )


def _trusted_root(path: Path) -> Any:
    """Raises ReleaseError for a file that holds no trust root."""
    models, form = _library("sigstore.models"), _library("sigstore_models.trustroot.v1")
    try:
        tree = parse_json(read_plain(path, "record"))
        return models.TrustedRoot(form.TrustedRoot.from_json(json.dumps(tree.get("trustedRoot", tree))))
    except Exception as error:  # of the system, pydantic and sigstore
        raise ReleaseError(
            f"{path}: is no trust root of Sigstore ({one_line(error, 120)}): name its trusted_root.json"
        ) from error


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReleaseError(_EXTRA) from error
