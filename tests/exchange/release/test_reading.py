"""verify reads every byte once, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from record_runs import done, weftrain
from release_cases import flip

from weftrain.cli.verify import verified_release
from weftrain.core.errors import ReleaseError
from weftrain.exchange.huggingface.folder import HuggingFaceWeights
from weftrain.exchange.release import notes, reading
from weftrain.exchange.release.notes import noted
from weftrain.exchange.release.release import read_release

STATE = "checkpoints/step_00000004/state-00001-of-00001.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder; every file is noted, however small and new it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(notes, "_LEAST_BYTES", 1)
    monkeypatch.setattr(notes, "_SETTLED_NS", 0)
    monkeypatch.setattr(reading, "_FILES_AT_ONCE", 1)  # so that what was read before the interrupt is known
    return tmp_path / "cache" / "weftrain" / "verify"


def interrupted(release: Path) -> None:
    """A verify that ends as by Ctrl-C after three quarters of the bytes."""

    def stop(read: int, total: int) -> None:
        if read > 0.75 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), noted(release, read_release(release).root) as note:
        verified_release(release, progress=stop, notes=note)


def test_each_byte_is_read_once_and_told(release: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = HuggingFaceWeights._load
    monkeypatch.setattr(HuggingFaceWeights, "_load", lambda self, name: loaded.append(name) or load(self, name))
    told: list[tuple[int, int]] = []
    verified = verified_release(release, progress=lambda read, total: told.append((read, total)))
    assert told[-1] == (verified.num_bytes, verified.num_bytes)
    assert [read for read, _ in told] == sorted(read for read, _ in told)
    assert not any("ln_" in name or "wte" in name for name in loaded)  # equal by their hashes
    assert any("c_attn" in name for name in loaded)  # q, k and v in one, transposed


def test_an_interrupted_verify_goes_on(release: Path, cache: Path) -> None:
    interrupted(release)
    (note,) = cache.iterdir()
    lines = note.read_bytes().splitlines()
    assert note.stat().st_mode & 0o077 == 0
    fields = json.loads(done(weftrain("verify", release, "--json")))
    assert (fields["kind"], fields["files_read_before"], fields["signer"]) == ("release", len(lines), None)
    assert {claim["cover"] for claim in fields["claims"]} == {"hash", "derivation", "not covered"}
    assert not list(cache.iterdir())  # the next one reads every byte
    assert json.loads(done(weftrain("verify", release, "--json")))["files_read_before"] == 0
    interrupted(release)
    assert "files were read by a verify that was interrupted" in done(weftrain("verify", release))
    interrupted(release)
    assert "were read by" not in done(weftrain("verify", release, "--from-start"))


def test_a_note_never_vouches_for_other_bytes(release: Path, cache: Path) -> None:
    """Whoever changes a file may set its time of change back; ctime and the drawn blocks tell."""
    interrupted(release)
    path = release / STATE
    before = path.stat()
    assert STATE.encode() in b"".join(note.read_bytes() for note in cache.iterdir())
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    result = weftrain("verify", release)
    assert (result.exit_code, "has changed since the release was made" in result.output) == (2, True)
    assert not list(cache.iterdir())


def test_blocks_tell_where_the_times_do_not(release: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes.Notes, "look", lambda self, path: [0, 0, path.stat().st_size, 0, 0])
    monkeypatch.setattr(notes, "_PROBE_BYTES", 1 << 30)  # the tests' files are small: one block from the start
    monkeypatch.setattr("secrets.randbelow", lambda stop: 0)
    interrupted(release)
    flip(release / STATE)
    result = weftrain("verify", release)
    assert (result.exit_code, "has changed since the release was made" in result.output) == (2, True)


@pytest.mark.parametrize("text", [b"\xff\n", b"[]\n", b'{"name":"recipe.json"}\n', b"{" * 100_000 + b"\n"])
def test_a_damaged_note_is_no_note(text: bytes, release: Path, cache: Path) -> None:
    interrupted(release)
    (note,) = cache.iterdir()
    note.write_bytes(text)
    assert json.loads(done(weftrain("verify", release, "--json")))["files_read_before"] == 0


def test_a_note_folder_that_others_may_write_to_is_not_used(release: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with noted(release, "0" * 64) as note:
        assert note is None


def meanwhile(change: Callable[[Path], object], release: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What verify says where a small file, which is read after the large ones, is changed while the first is read."""
    monkeypatch.setattr(reading, "_FILES_AT_ONCE", 1)
    changed = []

    def progress(read: int, total: int) -> None:
        if not changed:
            changed.append(change(release / "metrics.jsonl"))

    with pytest.raises(ReleaseError) as caught:
        verified_release(release, progress=progress)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_goes_meanwhile_is_one_line(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = meanwhile(lambda path: path.unlink(), release, monkeypatch)
    assert "metrics.jsonl: cannot be read: No such file or directory: fetch it again" in words


def test_a_file_that_shrinks_meanwhile_is_one_line(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (release / "metrics.jsonl").stat().st_size
    words = meanwhile(lambda path: os.truncate(path, size - 1), release, monkeypatch)
    assert f"metrics.jsonl: holds {size - 1:,} bytes, release.json says {size:,}: fetch it again" in words


def test_a_checkpoint_alone_as_json(release: Path) -> None:
    fields = json.loads(done(weftrain("verify", release / "checkpoints" / "step_00000004", "--json")))
    assert (fields["kind"], fields["step"]) == ("checkpoint", 4)
