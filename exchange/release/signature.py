"""Signs a release: an Ed25519 signature (RFC 8032) of its root, made and checked with the `cryptography` package.

signature.json: {"algorithm", "public_key", "root", "signature"}, hexadecimal. The signed bytes are DOMAIN followed by
the root's 32 bytes. A valid signature proves that the holder of this key signed. Whose key it is must be known from
elsewhere: `weftrain verify --key` names the key that is expected.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain

DOMAIN = b"weftrain release root\x00"  # so that a signature of something else never is one of a root
_EXTRA = "signatures need the package `cryptography`: pip install 'weftrain[sign]'"


def new_key(path: Path) -> str:
    """Write a new private key as PEM (PKCS 8, unencrypted, mode 600); returns the public key in hexadecimal. Raises
    ReleaseError.
    """
    ed25519, serialization = _cryptography()
    if path.exists():
        raise ReleaseError(f"{path}: is there already: a key is never written over")
    key = ed25519.Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    before = os.umask(0o077)  # nobody else may read it, not even while it is written
    try:
        fsops.write_bytes(path, key.private_bytes(*form))
    finally:
        os.umask(before)
    return _public(key.public_key())


def sign(path: Path, root: str, key_file: Path) -> str:
    """Write the signature of `root` to `path`; returns the public key in hexadecimal. Raises ReleaseError for a file
    that is not a private Ed25519 key.
    """
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_private_key(read_plain(key_file, "key"), password=None)
    except (ValueError, TypeError) as error:
        raise ReleaseError(
            f"{key_file}: is no unencrypted private key in PEM: make one with `weftrain sign --new-key`"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ReleaseError(f"{key_file}: is no Ed25519 key: make one with `weftrain sign --new-key`, or with openssl")
    public = _public(key.public_key())
    signature = key.sign(DOMAIN + bytes.fromhex(root)).hex()
    value = {"algorithm": "ed25519", "public_key": public, "root": root, "signature": signature}
    fsops.write_bytes(path, canonical_json(value) + b"\n")
    return public


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
