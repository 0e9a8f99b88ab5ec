"""Signing a release and checking who signed it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from forgery import write_release
from record_runs import done, weftrain

from weftrain.core.formats.canonical import canonical_json


def test_signatures(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key, other = tmp_path / "key.pem", tmp_path / "other.pem"
    public = done(weftrain("sign", "--new-key", "--key", key)).split()[-1]
    stranger = done(weftrain("sign", "--new-key", "--key", other)).split()[-1]
    assert os.stat(key).st_mode & 0o777 == 0o600
    assert "is there already" in weftrain("sign", "--new-key", "--key", key).output
    assert public in done(weftrain("sign", release, "--key", key))
    assert f"signed by {public}" in done(weftrain("verify", release))
    done(weftrain("verify", release, "--key", public))
    refused = weftrain("verify", release, "--key", stranger)
    assert refused.exit_code == 2
    assert f"is signed by {public}, not by {stranger}" in refused.output
    signature = json.loads((release / "signature.json").read_bytes())
    (release / "signature.json").write_bytes(canonical_json(signature | {"public_key": stranger}))
    assert "the signature is not valid" in weftrain("verify", release).output
    (release / "signature.json").write_bytes(canonical_json(signature))
    (release / "analyses").mkdir()
    (release / "analyses" / "note.txt").write_text("another story")
    write_release(release)  # consistent, but of another root
    assert "is of another root" in weftrain("verify", release).output
    assert "is no unencrypted private key" in weftrain("sign", release, "--key", release / "README.md").output
