"""Summaries of memorization results: means by what a checkpoint had seen, distributions, correlations; JSON and plots.

A correlation is between two checkpoints over the same rows, not between two chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weftrain.analysis.figure import new_figure, picture
from weftrain.analysis.memorization.scores import FORMAT, MemorizationResult, Parameters, Relation, figures
from weftrain.core.formats import fsops
from weftrain.core.formats.strict_model import StrictModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELATIONS: tuple[Relation, ...] = ("just seen", "earlier", "partly seen", "unseen", "unknown")
PICTURES = ("distribution.png", "matrix_score.png", "matrix_extractible.png", "correlation.png", "seen.png")


def distribution(results: Sequence[MemorizationResult]) -> list[int]:
    """The number of rows with 0, 1, ... l matches. results: at least one, all with the same l."""
    matches = np.concatenate([np.asarray(result.matches, dtype=np.int64) for result in results])
    counts: list[int] = np.bincount(matches, minlength=results[0].parameters.continuation_tokens + 1).tolist()
    return counts


def correlation(
    results: Sequence[MemorizationResult], value: Literal["scores", "extractible"]
) -> tuple[list[int], list[list[float | None]]]:
    """Steps of the checkpoints, and the Pearson correlation of each pair over the rows of their common chunks.

    None where it is undefined: a checkpoint at which all rows are alike.
    """
    by_step: dict[int, dict[str, MemorizationResult]] = {}
    for result in results:
        by_step.setdefault(result.step, {})[result.chunk] = result
    common = [chunk for chunk in next(iter(by_step.values()), {}) if all(chunk in found for found in by_step.values())]
    if not common:
        return list(by_step), [[None] * len(by_step) for _ in by_step]
    rows = np.stack(
        [
            np.concatenate([getattr(found[chunk], value) for chunk in common]).astype(np.float64)
            for found in by_step.values()
        ]
    )
    return list(by_step), [[_pearson(a, b) for b in rows] for a in rows]


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """fp64 [n] twice; None where either is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


class MemorizationMean(StrictModel):
    """Over all rows of some chunks."""

    mean_score: float
    extractible_percent: float
    rows: int


def by_relation(results: Sequence[MemorizationResult]) -> dict[int, dict[Relation, MemorizationMean]]:
    """Step -> what the checkpoint had seen of a chunk -> the means over the rows of all such chunks, if any."""
    found: dict[int, dict[Relation, list[MemorizationResult]]] = {}
    for result in results:
        found.setdefault(result.step, {}).setdefault(result.relation, []).append(result)
    return {step: {name: _mean(chosen) for name, chosen in groups.items()} for step, groups in found.items()}


def _mean(results: Sequence[MemorizationResult]) -> MemorizationMean:
    matches = [match for result in results for match in result.matches]
    score, percent = figures(matches, results[0].parameters.continuation_tokens)
    return MemorizationMean(mean_score=score, extractible_percent=percent, rows=len(matches))


def summary(results: Sequence[MemorizationResult], parameters: Parameters) -> dict[str, Any]:
    """Everything as JSON values: the matrix of checkpoint x chunk, means, distributions and correlations."""
    cells = [
        {
            **result.model_dump(
                include={"step", "root", "chunk", "kind", "dataset_id", "mean_score", "extractible_percent", "repeated"}
            ),
            "relation": result.relation,
            "rows": len(result.matches),
        }
        for result in results
    ]
    steps, scores = correlation(results, "scores")
    _, extractible = correlation(results, "extractible")
    means = {
        str(step): {name: mean.model_dump() for name, mean in groups.items()}
        for step, groups in by_relation(results).items()
    }
    return {
        "format": f"{FORMAT}-summary",
        "version": 1,
        "parameters": parameters.model_dump(),
        "matrix": cells,
        "by_relation": means,
        "distribution": {
            str(step): distribution([result for result in results if result.step == step]) for step in steps
        },
        "correlation": {"steps": steps, "scores": scores, "extractible": extractible},
    }


# Pictures


def draw(results: Sequence[MemorizationResult], folder: Path) -> list[Path]:
    """Write PICTURES into `folder`, which exists; their paths. Raises DataError without matplotlib (weftrain[plot])."""
    steps, scores = correlation(results, "scores")
    extractible = correlation(results, "extractible")[1]
    figures_ = (
        _distribution_figure(results, steps),
        _matrix_figure(results, "mean_score", "mean score"),
        _matrix_figure(results, "extractible_percent", "extractible, %"),
        _correlation_figure(steps, {"scores": scores, "extractibility": extractible}),
        _seen_figure(results, steps),
    )
    paths = [folder / name for name in PICTURES]
    for figure, path in zip(figures_, paths, strict=True):
        fsops.write_bytes(path, picture(figure))
    return paths


def _distribution_figure(results: Sequence[MemorizationResult], steps: Sequence[int]) -> Figure:
    """One line a checkpoint: percentage of rows by matches, over rows trained on, or over all if there are none."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    trained = [result for result in results if result.relation in ("just seen", "earlier")]
    for step in steps:
        chosen = [result for result in trained or results if result.step == step]
        if chosen:
            counts = np.asarray(distribution(chosen))
            axes.plot(
                np.arange(len(counts)) / (len(counts) - 1),
                100 * counts / counts.sum(),
                marker=".",
                label=f"step {step}",
            )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("score")
    axes.set_ylabel("% of the rows trained on" if trained else "% of all rows")
    axes.legend(fontsize="small")
    return figure


def _matrix_figure(
    results: Sequence[MemorizationResult], value: Literal["mean_score", "extractible_percent"], title: str
) -> Figure:
    """Checkpoint x chunk; what a checkpoint had seen is outlined."""
    from matplotlib.patches import Rectangle

    steps, chunks = list(dict.fromkeys(one.step for one in results)), list(dict.fromkeys(one.chunk for one in results))
    figure = new_figure(max(5.0, 0.7 * len(chunks) + 2.5), max(3.0, 0.45 * len(steps) + 2.0))
    axes = figure.add_subplot()
    table = np.full((len(steps), len(chunks)), np.nan)
    for one in results:
        row, column = steps.index(one.step), chunks.index(one.chunk)
        table[row, column] = getattr(one, value)
        if len(results) <= 400:
            axes.text(
                column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize="x-small", color="white"
            )
        if one.relation in ("just seen", "earlier"):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.5))
    # Dark at the top end as well, so that white figures can be read everywhere.
    image = axes.imshow(table, aspect="auto", cmap="copper", vmin=0, vmax=1.3 * max(float(np.nanmax(table)), 1e-9))
    figure.colorbar(image, label=title)
    axes.set_xticks(range(len(chunks)), chunks, rotation=60, ha="right", fontsize="x-small")
    axes.set_yticks(range(len(steps)), [f"step {step}" for step in steps], fontsize="small")
    axes.set_title(f"{title}; outlined: trained on by then", fontsize="medium")
    return figure


def _correlation_figure(steps: Sequence[int], tables: dict[str, list[list[float | None]]]) -> Figure:
    """Checkpoint x checkpoint, for scores and extractibility; grey where undefined."""
    figure = new_figure(11, 4.8)
    for place, (name, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        axes.set_facecolor("lightgrey")
        values = np.array([[np.nan if one is None else one for one in row] for row in table], dtype=np.float64)
        image = axes.imshow(values, cmap="coolwarm", vmin=-1, vmax=1)
        axes.set_xticks(range(len(steps)), [str(step) for step in steps], rotation=60, fontsize="x-small")
        axes.set_yticks(range(len(steps)), [str(step) for step in steps], fontsize="x-small")
        axes.set_title(f"correlation of {name} between checkpoints", fontsize="medium")
    figure.colorbar(image, ax=figure.axes, label="Pearson")
    return figure


def _seen_figure(results: Sequence[MemorizationResult], steps: Sequence[int]) -> Figure:
    """Lines over checkpoints: the chunk just seen, earlier ones, unseen ones."""
    figure, means = new_figure(10, 4), by_relation(results)
    for place, (value, title) in enumerate(
        (("mean_score", "mean score"), ("extractible_percent", "extractible, %")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for name in RELATIONS:
            points = [(step, getattr(means[step][name], value)) for step in steps if name in means[step]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return figure
