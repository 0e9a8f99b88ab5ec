"""Provenance of each checkpoint of a release as in-toto statements with the SLSA v1 predicate, derived from the ledger.

One statement a link: its subjects are the files of the checkpoint that the link ends in and of the revision with its
weights; its dependencies are the checkpoint that it starts from and the datasets; its parameters are the recipe and the
range of steps and samples. Statements lie in a folder of their own beside a release, so they add no claim to it: they
follow from it, and `weftrain verify --statements` derives them again. With an EC key each is in a DSSE envelope.

https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance, https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.checkpoint_manifest import folder_name, read_checkpoint_manifest
from weftrain.core.formats.dataset import MANIFEST as DATA_MANIFEST
from weftrain.core.formats.plain_file import read_plain
from weftrain.exchange.release.claims import PROVENANCE, Claim
from weftrain.exchange.release.release import Link, Release, revisions

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_BUILD_TYPE = "urn:weftrain:link:1"
_EXTRA = "signed statements need the package `securesystemslib`: pip install 'weftrain[sign]'"


def statements(folder: Path, release: Release) -> Iterator[tuple[str, bytes]]:
    """(name of the file, canonical JSON) of each link of a verified release. Raises CheckpointError."""
    names = {root: name for name, root in revisions(release)}
    for link in release.links:
        end = f"checkpoints/{folder_name(link.stop_step)}"
        manifest = read_checkpoint_manifest(folder / end)
        start = [] if link.start is None else [f"checkpoints/{folder_name(link.first_step)}"]
        statement = {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": _resources(release, end, f"revisions/{names[link.end]}"),
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": _predicate(release, link, manifest, _resources(release, *start) + _data(release)),
        }
        yield f"{names[link.end]}.intoto.json", canonical_json(statement)


def _predicate(release: Release, link: Link, manifest: dict[str, Any], dependencies: list[Any]) -> dict[str, Any]:
    span = {"first_step": link.first_step, "stop_step": link.stop_step, "samples": list(link.samples)}
    return {
        "buildDefinition": {
            "buildType": _BUILD_TYPE,
            "externalParameters": {"recipe": manifest["recipe"], "chunk": link.chunk, **span},
            "internalParameters": {"fingerprint": manifest["fingerprint"]},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": "urn:weftrain", "version": {"weftrain": release.weftrain}},
            "metadata": {"invocationId": f"{release.ledger}/{link.link}"},  # the ledger's last line, and the link
        },
    }


def _resources(release: Release, *places: str) -> list[dict[str, Any]]:
    """The files below these folders of a release, as in-toto describes resources."""
    return [
        {"name": name, "digest": {"sha256": entry.sha256}}
        for name, entry in sorted(release.files.items())
        if any(name.startswith(f"{place}/") for place in places)
    ]


def _data(release: Release) -> list[dict[str, Any]]:
    return [one for one in _resources(release, "data") if one["name"].endswith(f"/{DATA_MANIFEST}")]


def write_statements(folder: Path, release: Release, target: Path, key: Path) -> int:
    """Write every statement into `target`, a folder outside of the release, each in a DSSE envelope that an EC key in
    PEM signs. Returns how many. Raises ReleaseError.
    """
    if target.resolve().is_relative_to(folder.resolve()):
        raise ReleaseError(f"{target}: lies in the release, whose files are fixed: name a folder outside of it")
    if target.exists():
        raise ReleaseError(f"{target}: is there already: name a new folder")
    dsse, signer = _library()
    from cryptography.hazmat.primitives import serialization

    try:
        private = signer.CryptoSigner(serialization.load_pem_private_key(read_plain(key, "key"), password=None))
    except Exception as error:  # of cryptography and securesystemslib
        raise ReleaseError(f"{key}: is no unencrypted private key that signs statements: {one_line(error)}") from error
    count = 0
    with fsops.temporary_tree(target) as temporary:
        for name, payload in statements(folder, release):
            envelope = dsse.Envelope(payload, PAYLOAD_TYPE, {})
            envelope.sign(private)
            fsops.write_bytes(temporary / name, canonical_json(envelope.to_dict()) + b"\n")
            count += 1
        fsops.rename(temporary, target)
    return count


def check_statements(folder: Path, release: Release, place: Path, key: Path | None) -> Claim:
    """Whether the statements in `place` are those that follow from a verified release, and are signed by a public key
    in PEM where one is given. Without it they are covered by derivation alone, and the claim says whether anybody
    signed them. Raises ReleaseError.
    """
    dsse, signer = _library()
    public = None if key is None else _public_key(signer, key)
    expected = dict(statements(folder, release))
    for name in sorted({path.name for path in place.iterdir()} ^ expected.keys()):
        what = "is missing" if name in expected else "is no statement about a link of this release"
        raise ReleaseError(f"{place / name}: {what}: have the statements made again")
    unsigned = 0
    for name, payload in expected.items():
        try:
            envelope = dsse.Envelope.from_dict(parse_json(read_plain(place / name, "record", follow=False)))
        except Exception as error:  # of securesystemslib, which has many, or a file that is no envelope
            raise ReleaseError(f"{place / name}: is no DSSE envelope ({one_line(error, 120)})") from error
        if (envelope.payload, envelope.payload_type) != (payload, PAYLOAD_TYPE):
            raise ReleaseError(f"{place / name}: does not follow from the release's ledger: one was altered")
        unsigned += not envelope.signatures
        if public is not None:
            try:
                envelope.verify([public], 1)
            except Exception as error:
                why = "nobody signed it" if not envelope.signatures else one_line(error, 120)
                raise ReleaseError(f"{place / name}: is not signed by the key in {key} ({why})") from error
    words = f"{len(expected)} in {place} follow from the release"
    if public is not None:
        return Claim(PROVENANCE, "signature", f"{words}, signed by {key}")
    if unsigned:
        return Claim(
            PROVENANCE, "derivation", f"{words}; {unsigned} of them are not signed: anybody can have made them"
        )
    return Claim(PROVENANCE, "derivation", f"{words}; signed by a key that you did not name: --key checks it")


def _public_key(signer: Any, path: Path) -> Any:
    """The public key of a file in PEM, as securesystemslib holds it. Raises ReleaseError."""
    from cryptography.hazmat.primitives import serialization

    try:
        return signer.SSlibKey.from_crypto(serialization.load_pem_public_key(read_plain(path, "key")))
    except Exception as error:  # of the system, cryptography and securesystemslib
        raise ReleaseError(
            f"{path}: cannot be read as a public key in PEM that checks statements: {one_line(error, 120)}: name the "
            "file that `weftrain sign --new-key` wrote, KEY.pub"
        ) from error


def _library() -> tuple[Any, Any]:
    try:
        from securesystemslib import dsse, signer
    except ImportError as error:
        raise ReleaseError(_EXTRA) from error
    return dsse, signer
