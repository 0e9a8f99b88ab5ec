"""Keys, and the signature of a release by an Ed25519 key (RFC 8032): of its root, made and checked with the
`cryptography` package. An EC key signs a bundle instead, which other programs read (bundle.py).

signature.json: {"algorithm", "public_key", "root", "signature"}, hexadecimal. The signed bytes are DOMAIN followed by
the root's 32 bytes. A valid signature proves that the holder of this key signed. Whose key it is must be known from
elsewhere: `weftrain verify --key` names the key that is expected.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.exchange.release.bundle import sign_bundle
from weftrain.exchange.release.release import SIGNATURE, Release

DOMAIN = b"weftrain release root\x00"  # so that a signature of something else never is one of a root
_HEX = re.compile("[0-9a-fA-F]{64}")
_EXTRA = "signatures need the package `cryptography`: pip install 'weftrain[sign]'"


def new_key(path: Path) -> Path:
    """Write a new private key (ECDSA on P-256) as PEM (PKCS 8, unencrypted, mode 600) and its public key beside it;
    returns the path of that, `KEY.pub`. Raises ReleaseError.
    """
    _, serialization = _cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec

    public = path.with_name(f"{path.name}.pub")
    for one in (path, public):
        if one.exists() or one.is_symlink():
            raise ReleaseError(f"{one}: is there already: a key is never written over")
    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    before = os.umask(0o077)  # nobody else may read it, not even while it is written
    try:
        fsops.write_bytes(path, key.private_bytes(*form))
    finally:
        os.umask(before)
    fsops.write_bytes(public, _pem(key.public_key()))
    return public


def sign(folder: Path, release: Release, key_file: Path) -> str:
    """Sign a verified release with a private key in PEM: an EC key writes model.sig (bundle.py), an Ed25519 key
    signature.json. Returns what names the key. Raises ReleaseError for a file that is neither.
    """
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_private_key(read_plain(key_file, "key"), password=None)
    except (ValueError, TypeError) as error:
        raise ReleaseError(
            f"{key_file}: is no unencrypted private key in PEM: make one with `weftrain sign --new-key`"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        return sign_bundle(folder, release, key_file)
    public = _public(key.public_key())
    signature = key.sign(DOMAIN + bytes.fromhex(release.root)).hex()
    value = {"algorithm": "ed25519", "public_key": public, "root": release.root, "signature": signature}
    fsops.write_bytes(folder / SIGNATURE, canonical_json(value) + b"\n")
    return public


def expected_key(given: str) -> tuple[str | None, Path | None]:
    """A public key that the reader trusts, of signature.json in hexadecimal, or the file of one of a bundle: `given` is
    64 hexadecimal digits or the path of a file in PEM. Raises ReleaseError.
    """
    if _HEX.fullmatch(given):
        return given.lower(), None
    ed25519, serialization = _cryptography()
    path = Path(given)
    try:
        key = serialization.load_pem_public_key(read_plain(path, "key"))
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(
            f"--key {given[:80]}: is neither an Ed25519 key in hexadecimal nor the file of a public key in PEM"
        ) from error
    return (_public(key), None) if isinstance(key, ed25519.Ed25519PublicKey) else (None, path)


def check_signature(path: Path, root: str) -> str:
    """The public key, in hexadecimal, that signed `root`. Raises ReleaseError for a signature that is not of it."""
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    try:
        value = parse_json(read_plain(path, "key"))
        if (
            not isinstance(value, dict)
            or set(value) != {"algorithm", "public_key", "root", "signature"}
            or value["algorithm"] != "ed25519"
        ):
            raise ValueError("is not an Ed25519 signature of this program")
        if value["root"] != root:
            raise ValueError("is of another root")
        public = bytes.fromhex(value["public_key"])
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(
            bytes.fromhex(value["signature"]), DOMAIN + bytes.fromhex(root)
        )
    except InvalidSignature as error:
        raise ReleaseError(
            f"{path}: the signature is not valid: the release was altered, or the key is another's"
        ) from error
    except (ValueError, TypeError) as error:
        raise ReleaseError(f"{path}: {error}: fetch the release again") from error
    return public.hex()


def _pem(key: Any) -> bytes:
    _, serialization = _cryptography()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_bytes(serialization.Encoding.PEM, form))


def _public(key: Any) -> str:
    _, serialization = _cryptography()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ReleaseError(_EXTRA) from error
    return ed25519, serialization
