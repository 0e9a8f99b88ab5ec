"""Distributions, means and correlations of memorization results, and their plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from memorization_cases import PARAMETERS, L, result_of

from weftrain.analysis.memorization.report import PICTURES, by_relation, correlation, distribution, draw, summary
from weftrain.analysis.memorization.scores import MemorizationResult


def test_distribution_counts_every_number_of_matches() -> None:
    found = distribution([result_of(1, [0, 0, L, 3]), result_of(1, [3, 1, 0, 0], "d")])
    assert found == [4, 1, 0, 2, 0, 0, 0, 0, 1]


def test_means_by_what_was_seen_weigh_rows_and_not_chunks() -> None:
    results = [
        result_of(8, [L, L], "a", 0, 4),
        result_of(8, [0, 0, 0, 0, 0, L], "b", 2, 6),
        result_of(8, [4, 4], "c", 6, 8),
        result_of(8, [1, 0], "d", 8, 12),
        result_of(8, [0, 0], "h", None, None, kind="heldout"),
    ]
    (means,) = by_relation(results).values()
    assert {name: (mean.mean_score, mean.extractible_percent, mean.rows) for name, mean in means.items()} == {
        "earlier": (3 / 8, 37.5, 8),
        "just seen": (0.5, 0.0, 2),
        "unseen": (1 / 32, 0.0, 4),
    }


def test_correlation_is_pearsons_over_the_rows_that_all_checkpoints_have() -> None:
    generator = np.random.default_rng(0)
    matches = {step: generator.integers(0, L + 1, 60).tolist() for step in (2, 4)}
    matches[6] = [L - match for match in matches[2]]
    matches[8] = [3] * 60
    results = [
        result_of(step, found[i : i + 30], name) for step, found in matches.items() for i, name in ((0, "a"), (30, "b"))
    ]
    results.append(result_of(2, [1, 2], "of_one_only"))
    steps, found = correlation(results, "scores")
    assert steps == [2, 4, 6, 8]
    expected = np.corrcoef(matches[2], matches[4])[0, 1]
    assert found[0][1] == found[1][0] == pytest.approx(expected)
    assert found[0][0] == pytest.approx(1)
    assert found[0][2] == pytest.approx(-1)
    assert found[3] == [None] * 4
    _, found = correlation(results, "extractible")
    expected = np.corrcoef(np.array(matches[2]) == L, np.array(matches[4]) == L)[0, 1]
    assert found[0][1] == pytest.approx(expected)


def test_summary_and_pictures(measuring: Callable[..., list[MemorizationResult]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = measuring(tmp_path / "results")
    found = json.loads(json.dumps(summary(results, PARAMETERS), allow_nan=False))
    assert [(cell["step"], cell["chunk"]) for cell in found["matrix"]] == [
        (s, f"chunk_{c}") for s in (4, 8) for c in (0, 4, 8)
    ]
    relations = [cell["relation"] for cell in found["matrix"]]
    assert relations == ["just seen", "unseen", "unseen", "earlier", "just seen", "unseen"]
    assert {step: sum(counts) for step, counts in found["distribution"].items()} == {"4": 12, "8": 12}
    paths = draw(results, tmp_path)
    assert [path.name for path in paths] == list(PICTURES)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    # one checkpoint, nothing correlates, nothing was trained on
    sample = [result_of(1, [0, 0], "s", None, None, kind="sample")]
    draw(sample, tmp_path)
