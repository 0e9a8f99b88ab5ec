"""`weftrain audit` of a run and of its release: clean as they are; a checkpoint that repeats another is found."""

from __future__ import annotations

from pathlib import Path

from record_runs import done, weftrain

from weftrain.core.formats.canonical import parse_json, sealed
from weftrain.exchange.audit.audit import audit, open_series


def test_a_run_and_its_release_are_clean(made: Path, release: Path) -> None:
    for folder in (made / "runs" / "crystal_demo", release):
        printed = done(weftrain("audit", folder, "--deep"))
        assert "3 revisions, no mistake found" in " ".join(printed.split())
        assert "run or release of weftrain" in " ".join(printed.split())
    facts = {fact.name: fact.status for fact in audit(open_series(str(release))).facts}
    assert facts["optimizer state"] == facts["data order"] == facts["config"] == facts["headers"] == "present"


def test_a_checkpoint_with_the_weights_of_another_is_found(release: Path) -> None:
    """As a forger would seal it: the manifest of the second step names the tensors of the third."""
    second, third = (release / "checkpoints" / f"step_{step:08d}" for step in (4, 6))
    own, other = (parse_json((folder / "manifest.json").read_bytes()) for folder in (second, third))
    for name in own["tensors"]:
        if name.startswith("weights/"):
            own["tensors"][name]["sha256"] = other["tensors"][name]["sha256"]
    (second / "manifest.json").write_bytes(sealed(own))
    found = [(one.kind, one.revisions) for one in audit(open_series(str(release)), "listing").findings]
    assert found == [("duplicate", ("step_00000004", "step_00000006"))]
