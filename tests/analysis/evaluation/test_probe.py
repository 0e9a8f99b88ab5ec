"""The probe loss of an audit: a revision that computes something else stands out, and a clean series has nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted_series import Weights, revision, trained

from weftrain.analysis.evaluation.probe import NAME, TEXT, probe_rows
from weftrain.cli.main import main

HEAD = "lm_head.weight"
STEPS = tuple(range(1000, 13_000, 1000))


@pytest.fixture(scope="module")
def weights() -> dict[int, Weights]:
    """A series late in a training: logits of some size, and weights that move by a thousandth of what they are."""
    first, second = trained((1000, 2000)).values()
    found: dict[int, Weights] = {}
    for step in STEPS:
        one = {name: first[name] + step / 1e6 * (second[name] - first[name]) for name in first}
        one |= {name: value + 1 for name, value in one.items() if "norm" in name}
        found[step] = {**one, HEAD: 20 * one[HEAD]}
    return found


def series(folder: Path, weights: dict[int, Weights]) -> Path:
    for step, one in weights.items():
        for name, data in revision(one).items():
            path = folder / f"step{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def findings(folder: Path, *more: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(main, ["audit", str(folder), "--deep", "--json", *more])
    found: list[dict[str, Any]] = json.loads(result.stdout)["findings"]
    return found


def test_a_clean_series_has_no_jump_and_a_head_that_is_not_its_own_has_one(
    weights: dict[int, Weights], tmp_path: Path
) -> None:
    assert findings(series(tmp_path / "clean", weights), "--probe") == []
    wrong = dict(weights)
    wrong[8000] = {**weights[8000], HEAD: np.roll(weights[8000][HEAD], 7, axis=0)}  # of another vocabulary's order
    planted = series(tmp_path / "planted", wrong)
    assert not {"loss jump", "norm jump"} & {one["kind"] for one in findings(planted)}
    (jump,) = [one for one in findings(planted, "--probe") if one["kind"] == "loss jump"]
    assert jump["revisions"] == ["step8000"]
    assert NAME in jump["evidence"]


def test_a_model_that_cannot_be_loaded_is_a_finding_and_the_audit_goes_on(
    weights: dict[int, Weights], tmp_path: Path
) -> None:
    folder = series(tmp_path, weights)
    config = json.loads((folder / "step3000" / "config.json").read_bytes())
    (folder / "step3000" / "config.json").write_text(json.dumps({**config, "hidden_act": "no_such"}))
    found = [one for one in findings(folder, "--probe") if one["kind"] == "bad file"]
    assert [one["revisions"] for one in found] == [["step3000"]]
    assert "hidden_act" in found[0]["evidence"]


def test_the_rows_hold_the_text_whatever_the_vocabulary_is() -> None:
    rows = probe_rows(48, 8).token_rows
    assert max(map(len, rows)) == 9
    assert [one for row in rows for one in row] == [byte % 48 for byte in TEXT.encode()][: sum(map(len, rows))]
    assert len(TEXT.encode()) - sum(map(len, rows)) <= 1


def test_without_deep_it_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["audit", str(tmp_path), "--probe"])
    assert result.exit_code == 2
    assert "--probe has no effect without --deep" in result.output
