"""The numbers of the paper's figures, of made records worked out by hand, and that the pictures draw those numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weftrain.analysis.compare.series import MeasureColumn, Series, SeriesPoint, heldout_column
from weftrain.analysis.figures.numbers import PANELS_OF_A_FILE, PaperFigure, as_json, paper_figures
from weftrain.analysis.memorization.scores import MemorizationResult, Parameters, figures
from weftrain.core.formats.canonical import canonical_json

L = 4
ARC = MeasureColumn("score", "arc", "acc, %", (("shots", "25"),))
WORDS = heldout_column("words", "d" * 64, 1000, False)


def series(name: str, values: dict[int, dict[MeasureColumn, float]], *results: MemorizationResult) -> Series:
    """Of 100 tokens a step."""
    points = tuple(SeriesPoint(step, 100 * step, "a" * 64, found) for step, found in values.items())
    return Series(name, "run", Path("runs") / name, points, "step x 100", {}, memorization=results)


def result(step: int, matches: list[int], first: int, stop: int, **parameters: Any) -> MemorizationResult:
    score, percent = figures(matches, L)
    fields: dict[str, Any] = {"format": "weftrain-memorization", "version": 1, "software": {}, "root": "a" * 64}
    fields |= {"kind": "training", "first_step": first, "stop_step": stop, "dataset_id": "d", "repeated": 0}
    fields |= {"chunk": f"chunk_{first}", "sample_numbers": list(range(len(matches))), "rows_sha256": "0" * 64}
    fields |= {"parameters": Parameters(prompt_tokens=3, continuation_tokens=L, **parameters)}
    return MemorizationResult(**fields, step=step, matches=matches, mean_score=score, extractible_percent=percent)


RESULTS = (
    result(2, [0, 4, 2, 4], 0, 2),
    result(2, [0, 0, 1, 0], 2, 4),
    result(4, [0, 4, 4, 4], 0, 2),
    result(4, [1, 1, 1, 4], 2, 4),
)
AMBER = series("amber", {2: {ARC: 25.0, WORDS: math.log(8)}, 4: {ARC: 37.5, WORDS: math.log(4)}}, *RESULTS)


def named(figures_: list[PaperFigure]) -> dict[str, PaperFigure]:
    return {one.name: one for one in figures_}


def test_every_figure_of_one_series_by_hand() -> None:
    drawn, missing = paper_figures([AMBER])
    assert missing == []
    found = named(drawn)
    assert list(found) == [
        "tasks",
        "perplexity",
        *(f"memorization_{name}" for name in ("distribution", "chunks", "correlation")),
    ]
    (tasks,) = found["tasks"].panels
    assert [(line.label, line.points) for line in tasks.lines] == [("amber", ((200.0, 25.0), (400.0, 37.5)))]
    (perplexity,) = found["perplexity"].panels
    assert perplexity.lines[0].points == ((200.0, pytest.approx(8)), (400.0, pytest.approx(4)))
    # Of step 2, the four rows of its chunk; of step 4, all eight: three and one of four are extractible.
    (distribution,) = found["memorization_distribution"].panels
    assert [line.points for line in distribution.lines] == [
        ((0.0, 25.0), (0.25, 0.0), (0.5, 25.0), (0.75, 0.0), (1.0, 50.0)),
        ((0.0, 12.5), (0.25, 37.5), (0.5, 0.0), (0.75, 0.0), (1.0, 50.0)),
    ]
    assert distribution.lines[1].label == "step 4: 50.00 % extractible"
    scores, extractible = found["memorization_chunks"].panels
    assert {line.label: line.points for line in scores.lines} == {
        "latest chunk": ((2.0, 10 / 16), (4.0, 7 / 16)),
        "earlier chunks": ((4.0, 12 / 16),),
        "not yet seen": ((2.0, 1 / 16),),
    }
    assert {line.label: line.points for line in extractible.lines} == {
        "latest chunk": ((2.0, 50.0), (4.0, 25.0)),
        "earlier chunks": ((4.0, 75.0),),
        "not yet seen": ((2.0, 0.0),),
    }
    of_scores, of_extractible = found["memorization_correlation"].matrices
    rows = [[0, 4, 2, 4, 0, 0, 1, 0], [0, 4, 4, 4, 1, 1, 1, 4]]
    assert of_scores.labels == ("2", "4")
    assert of_scores.values[0][1] == pytest.approx(np.corrcoef(rows)[0, 1])
    assert of_extractible.values[1][0] == pytest.approx(np.corrcoef(np.array(rows) == L)[0, 1])


def test_two_series_share_the_panels_of_what_both_have() -> None:
    other = heldout_column("words", "e" * 64, 1000, False)  # another set of that name
    crystal = series("crystal", {3: {ARC: 30.0, other: 1.0}, 5: {ARC: math.nan}})
    drawn, missing = paper_figures([AMBER, crystal])
    found = named(drawn)
    (tasks,) = found["tasks"].panels
    assert [(line.label, line.colour, len(line.points)) for line in tasks.lines] == [("amber", 0, 2), ("crystal", 1, 1)]
    assert [[line.label for line in panel.lines] for panel in found["perplexity"].panels] == [["amber"], ["crystal"]]
    assert len({panel.title for panel in found["perplexity"].panels}) == 2
    assert "memorization_chunks_amber" in found
    assert [(one.name, one.why) for one in missing] == [
        (f"memorization_{name}_crystal", f"no memorization is recorded: weftrain memorize {Path('runs/crystal')}")
        for name in ("distribution", "chunks", "correlation")
    ]


def test_what_the_record_lacks_is_named_with_the_command_that_makes_it() -> None:
    drawn, missing = paper_figures([series("new", {2: {WORDS: 1000.0}})])
    assert drawn == []  # exp(1000) is no number
    why = {one.name: one.why for one in missing}
    assert why["tasks"] == f"no task score is recorded: weftrain eval {Path('runs/new')} --preset llm360 --watch"
    assert why["perplexity"] == f"no held-out loss is recorded: weftrain eval {Path('runs/new')} --watch"
    (drawn_of_one, missing_of_one) = paper_figures([series("one", {}, RESULTS[0])])
    assert [one.name for one in drawn_of_one] == ["memorization_distribution", "memorization_chunks"]
    assert "two checkpoints with the same chunks" in missing_of_one[-1].why
    unseen = series("unseen", {}, RESULTS[1])
    reasons = [one.why for one in paper_figures([unseen])[1]][2:]
    assert [reason.split(" is ")[0] for reason in reasons[:2]] == [
        "no memorization of rows trained on",
        "no checkpoint's latest chunk",
    ]
    foreign = replace(AMBER, kind="huggingface")
    assert "order of the training data is not known" in paper_figures([foreign])[1][0].why


def test_other_lengths_are_not_mixed_and_are_named() -> None:
    few = result(2, [4], 0, 2, seed=9)
    drawn, _ = paper_figures([series("run", {}, few, *RESULTS)])
    chunks = named(drawn)["memorization_chunks"]
    assert chunks.panels[0].lines[0].points[0] == (2.0, 10 / 16)
    assert chunks.notes == ("of k3_l4_samples1000_seed0", "also recorded, and not drawn: k3_l4_samples1000_seed9")


def test_many_tasks_fill_several_files_and_many_checkpoints_are_thinned_evenly() -> None:
    tasks = {MeasureColumn("score", f"task{index:02}", "acc, %"): 50.0 for index in range(PANELS_OF_A_FILE + 1)}
    drawn, _ = paper_figures([series("run", {1: tasks}, *(result(step, [1, 2], 0, step) for step in range(1, 24)))])
    found = named(drawn)
    assert (len(found["tasks"].panels), len(found["tasks_2"].panels)) == (PANELS_OF_A_FILE, 1)
    labels = [line.label.split(":")[0] for line in found["memorization_distribution"].panels[0].lines]
    assert (len(labels), labels[0], labels[-1]) == (10, "step 1", "step 23")


def test_pictures_draw_these_numbers_and_have_the_same_bytes_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from weftrain.analysis.figures.draw import build, write

    drawn, missing = paper_figures([AMBER])
    for figure in drawn:
        axes = build(figure).axes
        for place, panel in zip(axes, figure.panels, strict=False):
            shown = [tuple(map(tuple, line.get_xydata().tolist())) for line in place.lines]  # type: ignore[union-attr]
            assert shown == [line.points for line in panel.lines]
            assert place.get_legend_handles_labels()[1] == [line.label for line in panel.lines]
        for place, matrix in zip(axes, figure.matrices, strict=False):
            np.testing.assert_array_equal(place.images[0].get_array(), np.array(matrix.values, dtype=float))
    paths = write(drawn[-1:], tmp_path, kinds := ("png", "svg", "pdf"))
    assert [path.name for path in paths] == [f"memorization_correlation.{kind}" for kind in kinds]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(paper_figures([AMBER])[0][-1:], tmp_path, kinds)] == before
    document = as_json([AMBER], drawn, missing)
    assert document["figures"][0]["panels"][0]["lines"] == [
        {"label": "amber", "points": [[200.0, 25.0], [400.0, 37.5]]}
    ]
    canonical_json(document)  # has no number that JSON lacks
