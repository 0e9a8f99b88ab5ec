"""A Sigstore of one's own, without a network: an authority that certifies identities for ten minutes, a log of its
certificates, a log of signatures with one entry, and an authority that says when it saw one. What it signs is a bundle
as `model_signing sign sigstore` writes it.

https://github.com/sigstore/protobuf-specs, https://www.rfc-editor.org/rfc/rfc6962, https://c2sp.org/signed-note,
https://www.rfc-editor.org/rfc/rfc3161
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

from asn1crypto import algos, cms, tsp
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

ISSUER, ISSUER_DER = (ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}") for number in (1, 8))
SCT = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
KIND = "application/vnd.in-toto+json"
TEN_MINUTES = datetime.timedelta(minutes=10)
_USAGE = dict.fromkeys(
    ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"],
    False,
)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _der(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.DER, form))


def _sign(key: Any, data: bytes) -> bytes:
    return bytes(key.sign(data, ec.ECDSA(hashes.SHA256())))


def _first_body(payload: bytes, signature: bytes, pem: bytes) -> bytes:
    told = {"signature": _base64(signature), "verifier": _base64(pem)}
    sums = [{"algorithm": "sha256", "value": hashlib.sha256(one).hexdigest()} for one in (signature, payload)]
    spec = {"envelopeHash": sums[0], "payloadHash": sums[1], "signatures": [told]}
    return json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}, separators=(",", ":")).encode()


def _second_body(signed: bytes, signature: bytes, der: bytes) -> bytes:
    verifier = {"keyDetails": "PKIX_ECDSA_P256_SHA_256", "x509Certificate": {"rawBytes": _base64(der)}}
    spec = {
        "data": {"algorithm": "SHA2_256", "digest": _base64(hashlib.sha256(signed).digest())},
        "signature": {"content": _base64(signature), "verifier": verifier},
    }
    body = {"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": {"hashedRekordV002": spec}}
    return json.dumps(body, separators=(",", ":")).encode()


class Sigstore:
    """One instance; another has other keys. now: when it was made, without microseconds."""

    def __init__(self) -> None:
        self.authority, self.certificates, self.log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        name = x509.Name.from_rfc4514_string("CN=authority,O=own")
        self.root = (
            x509.CertificateBuilder(name, name, self.authority.public_key(), x509.random_serial_number())
            .not_valid_before(self.now - datetime.timedelta(days=9))
            .not_valid_after(self.now + datetime.timedelta(days=9))
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .add_extension(
                x509.KeyUsage(**_USAGE, digital_signature=False, key_cert_sign=True, crl_sign=True), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.authority.public_key()), critical=False)
            .sign(self.authority, hashes.SHA256())
        )
        self.clock = ec.generate_private_key(ec.SECP256R1())
        self.clock_certificate = (
            x509.CertificateBuilder(
                name,
                x509.Name.from_rfc4514_string("CN=clock,O=own"),
                self.clock.public_key(),
                x509.random_serial_number(),
            )
            .not_valid_before(self.now - datetime.timedelta(days=9))
            .not_valid_after(self.now + datetime.timedelta(days=9))
            .add_extension(
                x509.KeyUsage(**_USAGE, digital_signature=True, key_cert_sign=False, crl_sign=False), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
            .sign(self.authority, hashes.SHA256())
        )

    def write_trusted_root(self, path: Path, *, within: bool = False) -> Path:
        """within: in a trust configuration, as clients of other instances have it."""
        start = (self.now - datetime.timedelta(days=9)).isoformat().replace("+00:00", "Z")

        def log(key: Any) -> dict[str, Any]:
            public = {"rawBytes": _base64(_der(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256"}
            return {
                "baseUrl": "https://log.invalid",
                "hashAlgorithm": "SHA2_256",
                "publicKey": public | {"validFor": {"start": start}},
                "logId": {"keyId": _base64(hashlib.sha256(_der(key)).digest())},
            }

        authority: dict[str, Any] = {
            "subject": {"organization": "own", "commonName": "authority"},
            "uri": "https://authority.invalid",
            "certChain": {"certificates": [{"rawBytes": _base64(self.root.public_bytes(serialization.Encoding.DER))}]},
            "validFor": {"start": start},
        }
        (root,) = authority["certChain"]["certificates"]
        own = {"rawBytes": _base64(self.clock_certificate.public_bytes(serialization.Encoding.DER))}
        clock = authority | {"uri": "https://clock.invalid", "certChain": {"certificates": [own, root]}}
        tree: dict[str, Any] = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.log)],
            "certificateAuthorities": [authority],
            "ctlogs": [log(self.certificates)],
            "timestampAuthorities": [clock],
        }
        urls = ("caUrls", "oidcUrls", "rekorTlogUrls", "tsaUrls")
        service = {"url": "https://log.invalid", "majorApiVersion": 1, "validFor": {"start": start}, "operator": "own"}
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": tree,
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                **{name: [service] for name in urls},
                **{name: {"selector": "ANY"} for name in ("rekorTlogConfig", "tsaConfig")},
            },
        }
        path.write_text(json.dumps(config if within else tree))
        return path

    def certificate(self, key: Any, identity: str, issuer: str) -> x509.Certificate:
        """For an address of mail, from now on for ten minutes, entered in the log of certificates."""
        ski = self.root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        text = issuer.encode()
        builder = (
            x509.CertificateBuilder(self.root.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
            .not_valid_before(self.now)
            .not_valid_after(self.now + TEN_MINUTES)
            .add_extension(
                x509.KeyUsage(**_USAGE, digital_signature=True, key_cert_sign=False, crl_sign=False), critical=True
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski), critical=False)
            .add_extension(x509.UnrecognizedExtension(ISSUER, text), critical=False)
            .add_extension(x509.UnrecognizedExtension(ISSUER_DER, bytes([12, len(text)]) + text), critical=False)
        )
        before = builder.sign(self.authority, hashes.SHA256()).tbs_certificate_bytes
        head = struct.pack("!BBQH", 0, 0, int(self.now.timestamp()) * 1000, 1)
        entry = hashlib.sha256(_der(self.authority)).digest() + len(before).to_bytes(3, "big") + before
        signature = _sign(self.certificates, head + entry + b"\x00\x00")
        sct = b"\x00" + hashlib.sha256(_der(self.certificates)).digest() + head[2:10] + b"\x00\x00" + b"\x04\x03"
        sct += struct.pack("!H", len(signature)) + signature
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        data = bytes([4, len(listed)]) if len(listed) < 128 else bytes([4, 0x81, len(listed)])
        builder = builder.add_extension(x509.UnrecognizedExtension(SCT, data + listed), critical=False)
        return builder.sign(self.authority, hashes.SHA256())

    def bundle(
        self,
        payload: bytes,
        identity: str,
        issuer: str,
        *,
        after: datetime.timedelta = datetime.timedelta(0),
        time: Literal["of the log", "of a timestamp", "of a timestamp, second log"] = "of the log",
    ) -> dict[str, Any]:
        """A statement that the identity signed, so long after it was certified. time: who says when: the log of
        signatures, or a timestamp (RFC 3161) beside an entry without a time, in the log's first or second form.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certificate(key, identity, issuer)
        signed = f"DSSEv1 {len(KIND)} {KIND} {len(payload)} ".encode() + payload
        signature, der = _sign(key, signed), certificate.public_bytes(serialization.Encoding.DER)
        if time == "of a timestamp, second log":
            kind, body = "hashedrekord", _second_body(signed, signature, der)
        else:
            kind, body = "dsse", _first_body(payload, signature, certificate.public_bytes(serialization.Encoding.PEM))
        entry = self._entry(kind, body, int((self.now + after).timestamp()))
        material = {"certificate": {"rawBytes": _base64(der)}, "tlogEntries": [entry]}
        if time != "of the log":
            del entry["integratedTime"], entry["inclusionPromise"]
            stamps = [{"signedTimestamp": _base64(self.timestamp(signature, self.now + after))}]
            material["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": material,
            "dsseEnvelope": {
                "payload": _base64(payload),
                "payloadType": KIND,
                "signatures": [{"sig": _base64(signature)}],
            },
        }

    def timestamp(self, data: bytes, at: datetime.datetime) -> bytes:
        """That `data` was there at this time: a TimeStampResp in DER."""
        sha256 = algos.DigestAlgorithm({"algorithm": "sha256"})
        told = tsp.TSTInfo(
            {
                "version": "v1",
                "policy": "1.2.3.4",
                "message_imprint": {"hash_algorithm": sha256, "hashed_message": hashlib.sha256(data).digest()},
                "serial_number": 1,
                "gen_time": at,
            }
        )
        der = self.clock_certificate.public_bytes(serialization.Encoding.DER)
        certificate = asn1_x509.Certificate.load(der)
        of = {"cert_hash": hashlib.sha256(der).digest(), "hash_algorithm": sha256}
        attributes = cms.CMSAttributes(
            [
                cms.CMSAttribute({"type": "content_type", "values": ["tst_info"]}),
                cms.CMSAttribute({"type": "message_digest", "values": [hashlib.sha256(told.dump()).digest()]}),
                cms.CMSAttribute(
                    {"type": "signing_certificate_v2", "values": [tsp.SigningCertificateV2({"certs": [of]})]}
                ),
            ]
        )
        signer = {
            "version": "v1",
            "sid": {
                "issuer_and_serial_number": {"issuer": certificate.issuer, "serial_number": certificate.serial_number}
            },
            "digest_algorithm": sha256,
            "signed_attrs": attributes,
            "signature_algorithm": {"algorithm": "sha256_ecdsa"},
            "signature": _sign(self.clock, attributes.dump()),
        }
        content = {
            "version": "v3",
            "digest_algorithms": [sha256],
            "encap_content_info": {"content_type": "tst_info", "content": told},
            "certificates": [certificate],
            "signer_infos": [signer],
        }
        token = {"content_type": "signed_data", "content": cms.SignedData(content)}
        return bytes(tsp.TimeStampResp({"status": {"status": "granted"}, "time_stamp_token": token}).dump())

    def _entry(self, kind: str, body: bytes, seconds: int) -> dict[str, Any]:
        """The first and only entry of the log of signatures, with its promise and its proof."""
        number, root = hashlib.sha256(_der(self.log)).digest(), hashlib.sha256(b"\x00" + body).digest()
        promised = {"body": _base64(body), "integratedTime": seconds, "logID": number.hex(), "logIndex": 0}
        promise = _sign(self.log, json.dumps(promised, sort_keys=True, separators=(",", ":")).encode())
        note = f"own log\n1\n{_base64(root)}\n"
        signed = f"{note}\n\u2014 own {_base64(number[:4] + _sign(self.log, note.encode()))}\n"
        return {
            "logIndex": "0",
            "logId": {"keyId": _base64(number)},
            "kindVersion": {"kind": kind, "version": json.loads(body)["apiVersion"]},
            "integratedTime": str(seconds),
            "inclusionPromise": {"signedEntryTimestamp": _base64(promise)},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _base64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": signed},
            },
            "canonicalizedBody": _base64(body),
        }
