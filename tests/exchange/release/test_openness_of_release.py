"""What `weftrain openness` says of a release of ours."""

from __future__ import annotations

import json
from pathlib import Path

from record_runs import done, weftrain


def test_openness_of_a_release(release: Path) -> None:
    found = {
        item["name"]: item["status"] for item in json.loads(done(weftrain("openness", release, "--json")))["items"]
    }
    assert {name for name, status in found.items() if status != "present"} == {"analyses"}
    printed = done(weftrain("openness", release))
    assert "checking the published scores" in " ".join(printed.split())
