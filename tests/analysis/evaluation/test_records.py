"""Where the records of evaluations lie."""

from __future__ import annotations

from pathlib import Path

from weftrain.analysis.evaluation.records import (
    records_folder,
)


def test_records_never_lie_in_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    lone = tmp_path / "lone" / "step_00000002"
    for folder in (checkpoint, lone):
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert (
        records_folder(checkpoint) == records_folder(tmp_path / "run") == tmp_path / "run" / "analyses" / "evaluations"
    )
    assert records_folder(lone) == tmp_path / "lone" / "analyses" / "evaluations"
