"""The note that leads workers to rank 0's rendezvous."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weftrain.backends.streaming.replicas.rendezvous import (
    are_released,
    open_rendezvous,
    read_note,
    release_replicas,
    remove_rendezvous,
)
from weftrain.core.errors import BackendError


def test_a_note_leads_to_the_rendezvous_and_is_removed_at_the_end(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    killed = open_rendezvous(tmp_path, "agreement")
    rendezvous = open_rendezvous(tmp_path, "agreement")
    assert read_note(tmp_path) == (rendezvous, "agreement")
    for path in (killed, rendezvous):
        path.write_bytes(b"")
    remove_rendezvous(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "note", ['{"agreement": "x", "rendezvous": "../elsewhere"}', '{"rendezvous": "rendezvous-0123456789abcdef"}', "[]"]
)
def test_a_note_of_another_form_is_refused(note: str, tmp_path: Path) -> None:
    (tmp_path / "replicas.json").write_text(note)
    with pytest.raises(BackendError, match="names no rendezvous: remove it"):
        read_note(tmp_path)


def test_replicas_of_a_complete_run_are_released_for_a_while(tmp_path: Path) -> None:
    assert not are_released(tmp_path, 600)
    open_rendezvous(tmp_path, "agreement")
    assert not are_released(tmp_path, 600)
    release_replicas(tmp_path)
    assert read_note(tmp_path) is None
    assert are_released(tmp_path, 600)
    (note,) = tmp_path.glob("replicas.json")
    os.utime(note, (note.stat().st_mtime - 700,) * 2)
    assert not are_released(tmp_path, 600)  # another process may lead now
    rendezvous = open_rendezvous(tmp_path, "agreement")
    assert (read_note(tmp_path), are_released(tmp_path, 600)) == ((rendezvous, "agreement"), False)
