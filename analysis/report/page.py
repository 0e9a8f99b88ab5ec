"""A run's page: one self-contained HTML file, with style, charts and the scripts that draw them in it.

Any text in it may be untrusted (a release's names and reasons), so it goes through `escape` where it enters the markup,
and the page's Content-Security-Policy permits no script but the constant ones. No clock is read: equal records give
equal bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from weftrain.analysis.markup import document, escape
from weftrain.analysis.report.chart import Chart, Curve, chart_html, data_html, figures, scripts
from weftrain.analysis.report.collect import Cell, LoggedCurve, Matrix, RunReport
from weftrain.analysis.report.ledger import RunStart, SavedCheckpoint, text, whole
from weftrain.analysis.report.samples import Samples
from weftrain.analysis.report.style import STYLE
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import real_path

T = TypeVar("T")
MAX_CELLS_A_SIDE = 64  # of a memorization matrix; what is between is left out, and said
MAX_LINES = 3000  # of the ledger and of the checkpoints: the first and the last
_READING = (
    "Steps are completed steps; shaded bands are chunks. Drag to zoom into a box, hold Ctrl and turn the wheel to zoom "
    "along both axes; all charts then show the same steps, and the circular arrow shows everything again. A click on a "
    "name hides its curve. A long curve is "
    "drawn by the least and the greatest of each of its parts, so that no spike is lost; smoothing is a mean of their "
    "means, whose weights halve with each half-life of distance. A vertical line says in its tooltip what it marks, as does the ledger below."
)
_WITHOUT_BOKEH = "Bokeh, which draws the curves, was not installed where this page was written: pip install bokeh"
_CONTROLS = (
    '<form class="controls"><label>Axis <select id="axis"><option value="automatic">automatic</option>'
    '<option value="linear">linear</option><option value="log">logarithmic</option>'
    '<option value="clipped">without the outer 1 %</option></select></label>'
    '<label>Smoothing <input id="smoothing" type="range" min="0" max="10" value="3"> <output id="smoothed"></output>'
    "</label></form>"
)
_FOOTER = (
    "<footer>Everything here is read from the run's own record; nothing was trained, loaded or verified to write it. "
    "<code>weftrain verify</code> checks a release's bytes, <code>weftrain replay</code> that they were trained "
    "so.</footer>"
)
_NONE = "-"
_RELATIONS = {"just seen": "*", "earlier": "+", "partly seen": "~", "unseen": "", "unknown": "?"}


def write_page(report: RunReport, path: Path) -> None:
    """Write the page; links to checkpoints are relative to its folder. Raises OSError."""
    fsops.write_bytes(path, page_html(report, real_path(path).parent).encode())


def page_html(report: RunReport, place: Path) -> str:
    """The page as text. place: the folder in which it will lie."""
    charts, embedded = _charts(report), scripts()
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(what)}</dd></div>"
        for name, value, what in report.tiles
    )
    sections = [
        ("curves", "Curves", _curves(report, charts, embedded is not None)),
        ("samples", "Samples of text", _samples(report.samples)),
        ("summary", "Summary", f'<dl class="tiles">{tiles}</dl>{_pairs(report.identity, code=True)}'),
        ("step", "A step: time and memory", _step(report, charts)),
        ("environment", "Machine and starts", _environment(report)),
        ("recipe", "Recipe arithmetic", _recipe(report)),
        ("checkpoints", "Data: chunks and checkpoints", _checkpoints(report, place)),
        ("memorization", "Memorization", _memorization(report)),
        ("evaluations", "Evaluations", _evaluations(report)),
        ("ledger", "Ledger", _ledger(report)),
    ]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{part}</section>'
        for key, title, part in sections
    )
    warnings = "".join(f"<li>{escape(words)}</li>" for words in report.warnings)
    warnings = f'<ul class="warnings" role="note" aria-label="warnings">{warnings}</ul>' if warnings else ""
    description = f'<p class="soft">{escape(report.description)}</p>' if report.description else ""
    head = f'<h1>{escape(report.name)}</h1><p><span class="status">{escape(report.status)}</span></p>{description}'
    sections_nav = f'<nav aria-label="sections"><ul>{links}</ul></nav>'
    data = "" if embedded is None else data_html(charts)
    body = f"<header>{head}{warnings}{sections_nav}</header><main>{body}</main>{_FOOTER}{data}"
    return document(f"{report.name}: run report", STYLE, body, embedded or ())


def _absent(words: str, command: str = "") -> str:
    return f'<p class="absent">{escape(words)}{f": <code>{escape(command)}</code>" if command else "."}</p>'


def _pairs(pairs: Sequence[tuple[str, str]], *, code: bool = False) -> str:
    rows = (
        f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(value)}</code>' if code and _is_hash(value) else escape(value)}</dd>"
        for name, value in pairs
    )
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def _is_hash(value: str) -> bool:
    return len(value) >= 32 and all(letter in "0123456789abcdef" for letter in value)


def _table(caption: str, head: Sequence[str], rows: Sequence[str], label: str, figures: Sequence[str]) -> str:
    """rows: <tr> markup. figures: the columns of `head` that hold figures. The table scrolls within its own box."""
    cells = "".join(f'<th scope="col"{" class=n" if name in figures else ""}>{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><caption><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _recipe(report: RunReport) -> str:
    if not report.arithmetic:
        return _absent("No recipe that this version understands was recorded, so nothing can be derived")
    return _pairs(report.arithmetic)


# Curves


def _charts(report: RunReport) -> list[Chart]:
    """Loss and learning rate, and a chart of each other figure that was logged."""
    if not (report.loss or report.heldout):
        return []
    losses = [*_named(report.loss, smooth=True), *_named(report.heldout, first=1, dots=True)]
    charts = [
        _chart(report, "Loss", "nats a token", losses),
        _chart(report, "Learning rate", "by parameter group", _named(report.learning_rate), from_zero=True),
    ]
    for name, scores in report.scores:
        charts.append(_chart(report, f"Scores: {name}", "of the recipe's evaluations", _named(scores, dots=True)))
    for metric in report.metrics:
        rate = metric.chart.rate
        level = (metric.median, f"median {metric.median:,.5g}") if rate and metric.median is not None else None
        curves = _named(metric.curves, smooth=True)
        if curves:
            charts.append(_chart(report, metric.chart.title, metric.chart.unit, curves, from_zero=rate, level=level))
    return charts


def _curves(report: RunReport, charts: Sequence[Chart], drawn: bool) -> str:
    if not charts:
        return _absent("No step was logged", "weftrain train RECIPE")
    held = (
        ""
        if report.heldout
        else _absent("No held-out loss was measured: set log.evaluate_every_steps and data with held-out rows")
    )
    if not drawn:
        return _absent(_WITHOUT_BOKEH) + held
    plots = "".join(chart_html(chart, number) for number, chart in enumerate(charts))
    return f'{_CONTROLS}<div class="charts">{plots}</div>{held}<p class="soft">{_READING}</p>'


def _samples(samples: Samples) -> str:
    """A column for each prompt, so that a text is read below its successors."""
    if not samples.rows:
        return _absent("No text was sampled: set log.sample_prompts in the recipe")
    shown = list(samples.shown())
    rows = [
        f'<tr><th scope="row" class="n">{step:,}</th>'
        f"{''.join(f'<td class=text>{_NONE if text is None else escape(text)}</td>' for text in texts)}</tr>"
        for step, texts in shown
    ]
    left_out = samples.steps - len(shown)
    caption = (
        "What the model wrote after each prompt, newest first, always the most likely token."
        f"{f' {left_out:,} evaluations in between are not shown.' if left_out else ''}"
    )
    return _table(caption, ("step", *samples.prompts), rows, "samples of text", ("step",))


def _chart(report: RunReport, title: str, unit: str, curves: Sequence[Curve], **more: Any) -> Chart:
    return Chart(title, unit, curves, report.last_step, report.marks, report.bands, **more)


def _step(report: RunReport, charts: Sequence[Chart]) -> str:
    """What a step took, and every curve in figures."""
    medians = {metric.chart.key: metric.median for metric in report.metrics if metric.median is not None}
    if not charts:
        return _absent("No step was logged, so nothing is known of its time")
    pairs = []
    step_ms = medians.get("step_ms")
    if step_ms is not None:
        pairs.append(("a step", f"{step_ms:,.4g} ms, median after the first tenth"))
    for key, name in (("data_wait_ms", "of it waiting for data"), ("stall_ms", "of it waiting for the store")):
        if key in medians and step_ms:
            pairs.append((name, f"{medians[key]:,.4g} ms, {medians[key] / step_ms:.1%}"))
    if "checkpoint_stall_ms" in medians:
        pairs.append(("a checkpoint keeps training waiting", f"{medians['checkpoint_stall_ms']:,.4g} ms"))
    for metric in report.metrics:
        if metric.chart.unit == "GiB" and (values := [one.points.values.max() for one in metric.curves]):
            pairs.append((f"{metric.chart.name}, greatest", f"{max(values):,.2f} GiB"))
    if report.time_spent is not None:
        pairs += report.time_spent.words()
    head = ("curve", "first", "at step", "last", "at step ", "least", "at step  ", "greatest", "at step   ")
    rows = [
        f'<tr><th scope="row">{escape(chart.title)}: {escape(name)}</th>'
        f"{''.join(f'<td class=n>{word}</td>' for word in words)}</tr>"
        for chart in charts
        for name, *words in figures(chart)
    ]
    return (_pairs(pairs) if pairs else "") + _table(
        "The curves in figures, of what counts.", head, rows, "curves in figures", head[1:]
    )


def _named(curves: Sequence[LoggedCurve], *, first: int = 0, dots: bool = False, smooth: bool = False) -> list[Curve]:
    """Traces as curves, a colour for each name; abandoned ones have the colour of their name."""
    colours: dict[str, int] = {}
    for curve in curves:
        colours.setdefault(curve.name, (first + len(colours)) % 6)
    return [Curve(curve.name, curve.points, colours[curve.name], curve.abandoned, dots, smooth) for curve in curves]


# Tables


def _checkpoints(report: RunReport, place: Path) -> str:
    if not report.checkpoints:
        return _absent(
            "No checkpoint was entered in a ledger: set checkpoint.every_steps, or data.chunks, and train on"
        )
    head = ("step", "chunk", "steps", "samples", "root", "parent", "metrics", "")
    shown, hidden = _ends(report.checkpoints)
    rows = [_checkpoint(report, saved, place) for saved in shown]
    left = sum(saved.abandoned is not None for saved in report.checkpoints)
    caption = (
        f"{len(report.checkpoints) - left:,} checkpoints on the line that counts{f', {left:,} abandoned' if left else ''}"
        f"{f', of which {hidden:,} in the middle are not shown' if hidden else ''}. Each was reached from its parent "
        "by the steps and samples named; metrics is the digest of the measurements between them. Hashes are whole in "
        "their tooltips."
    )
    return _table(caption, head, rows, "checkpoints and the chunks they end", head[:4])


def _ends(items: Sequence[T]) -> tuple[Sequence[T], int]:
    """At most MAX_LINES of them, from both ends, and how many in the middle are left out."""
    hidden = max(0, len(items) - MAX_LINES)
    return ([*items[: MAX_LINES // 2], *items[-(MAX_LINES // 2) :]] if hidden else items), hidden


def _checkpoint(report: RunReport, saved: SavedCheckpoint, place: Path) -> str:
    root = _hash(saved.root)
    if saved.place is not None:
        root = f'<a href="{escape(relative_link(report.folder / saved.place, place))}">{root}</a>'
    samples = "?" if saved.samples is None else _span(*saved.samples)
    note = "; ".join(
        [*([saved.abandoned] if saved.abandoned else []), *([] if saved.place else ["its folder is not here"])]
    )
    chunk = escape(saved.chunk or _NONE)
    return (
        f'<tr{" class=left" if saved.abandoned else ""}><th scope="row" class="n">{saved.step:,}</th><td class="n">{chunk}</td>'
        f'<td class="n">{_span(saved.first_step, saved.step)}</td><td class="n">{samples}</td><td>{root}</td>'
        f"<td>{_hash(saved.parent) if saved.parent else 'the seed'}</td><td>{_hash(saved.metrics_sha256)}</td>"
        f"<td{' class=words' if note else ''}>{escape(note)}</td></tr>"
    )


def _hash(value: str) -> str:
    return f'<code title="{escape(value)}">{escape(value[:12])}</code>'


def _span(first: int, stop: int) -> str:
    """[first, stop) as it is read."""
    return f"{first:,} to {stop - 1:,}" if stop > first else "none"


def relative_link(target: Path, place: Path) -> str:
    """A folder as a relative URL from `place`, never one that a browser takes for a scheme."""
    relative = quote(os.path.relpath(real_path(target), real_path(place)))
    return (relative if relative.startswith(".") else f"./{relative}") + "/"


def _memorization(report: RunReport) -> str:
    if not report.memorization:
        return _absent("No memorization was measured", "weftrain memorize RUN")
    return "".join(_matrix(matrix) for matrix in report.memorization)


def _matrix(matrix: Matrix) -> str:
    """Extractible percentage and mean score; the shade shows the score, and every figure is written out."""
    rows, chunks = _thin(matrix.rows), _thin(matrix.chunks)
    lines = []
    for step, root in rows:
        cells = "".join(_cell(matrix.cells.get((root, chunk)), f"step {step:,}, {chunk}") for chunk in chunks)
        lines.append(f'<tr><th scope="row" class="n">{step:,}</th><td>{_hash(root)}</td>{cells}</tr>')
    left_out = len(matrix.rows) * len(matrix.chunks) - len(rows) * len(chunks)
    caption = (
        f"{matrix.words}. In each cell: rows recited whole, in per cent, and the mean score from 0 to 1, which the "
        "shade shows. * just seen, + seen earlier, ~ seen in part, ? not known; without a sign: never seen by that "
        f"checkpoint.{f' {left_out:,} cells are left out, at even distances.' if left_out else ''}"
    )
    head = ("step", "root", *chunks)
    return _table(caption, head, lines, f"memorization, {matrix.words}", ("step", *chunks))


def _cell(cell: Cell | None, where: str) -> str:
    if cell is None:
        return '<td class="none" title="not measured">-</td>'
    title = (
        f"{where}: {cell.extractible_percent:.4g} % of {cell.rows:,} rows, mean score {cell.mean_score:.6f}, "
        f"{cell.relation}"
    )
    sign = _RELATIONS.get(cell.relation, "?")
    return (
        f'<td class="heat" style="--v:{cell.mean_score:.3f}" title="{escape(title)}"><b>{cell.extractible_percent:.2f} %</b> '
        f"{cell.mean_score:.4f}{f' {sign}' if sign else ''}</td>"
    )


def _thin(items: Sequence[Any]) -> Sequence[Any]:
    """At most MAX_CELLS_A_SIDE of them, the first and the last among them."""
    if len(items) <= MAX_CELLS_A_SIDE:
        return items
    return [items[index * (len(items) - 1) // (MAX_CELLS_A_SIDE - 1)] for index in range(MAX_CELLS_A_SIDE)]


def _evaluations(report: RunReport) -> str:
    if not report.evaluations:
        return _absent("No evaluation was recorded", "weftrain eval RUN --tasks ...")
    figures = ("version", "shots", "percent", "value", "samples", "step")
    head = ("task", "version", "shots", "metric", "percent", "value", "samples", "step", "root", "")
    counted = {saved.root for saved in report.checkpoints if saved.abandoned is None}
    rows = [_evaluation(record, counted) for record in report.evaluations]
    caption = (
        "Each row is a record under analyses/evaluations, checked against its own hash. ± is the standard error where "
        "the task states one."
    )
    return _table(caption, head, rows, "evaluations", figures)


def _evaluation(record: Mapping[str, Any], counted: set[str]) -> str:
    shots = record.get("shots")
    percent, error = _real(record.get("value_percent")), _real(record.get("stderr_percent"))
    shown = _NONE if percent is None else f"{percent:.2f}" + ("" if error is None else f" ± {error:.2f}")
    value = _real(record.get("value"))
    samples, step = (
        _NONE if (count := whole(record.get(key))) is None else f"{count:,}" for key in ("samples", "step")
    )
    root = text(record.get("checkpoint")) or text(record.get("weights_sha256")) or "?"  # the second: in memory
    left = bool(counted) and root not in counted and record.get("checkpoint") is not None
    note = ", ".join([*(["partial"] if record.get("partial") is True else []), *(["not on the line"] if left else [])])
    figures = (
        _or_none(record.get("task_version")),
        "mixed" if isinstance(shots, list) else _or_none(shots),
        _or_none(record.get("metric")),
        shown,
        _NONE if value is None else f"{value:.6g}",
        samples,
        step,
    )
    cells = "".join(
        f"<td{'' if place == 2 else ' class=n'}>{escape(figure)}</td>" for place, figure in enumerate(figures)
    )
    head = f'<th scope="row">{escape(record.get("task"))}</th>'
    return f"<tr{' class=left' if left else ''}>{head}{cells}<td>{_hash(root)}</td><td>{escape(note)}</td></tr>"


def _or_none(value: Any) -> Any:
    return _NONE if value is None else value


def _real(value: Any) -> float | None:
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


# Starts and the ledger


def _environment(report: RunReport) -> str:
    if not report.starts:
        return _absent("No start was entered in a ledger, so no environment is known")
    keys = dict.fromkeys(key for start in report.starts for key in start.facts)
    differing = [key for key in keys if len({start.facts.get(key) for start in report.starts}) > 1]
    same = [(key, report.starts[0].facts[key]) for key in keys if key not in differing]
    lanes = [(f"start {one.number}", one.first_step, one.kept, one.reached, _lane_words(one)) for one in report.starts]
    rows = [
        _start(before, start, differing) for before, start in zip([None, *report.starts], report.starts, strict=False)
    ]
    figures = ("start", "from step", "counts to", "reached")
    head = (*figures, "when (UTC)", "parent", *differing)
    caption = (
        "What differs between starts has a column; a cell that is marked, and says 'now', differs from the start "
        "before. "
        if differing
        else "All starts were made in one environment."
    )
    table = _table(caption, head, rows, "starts", figures)
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in same)
    common = f'<h3>The same in every start</h3><dl class="pairs many">{pairs}</dl>' if same else ""
    note = '<p class="soft">Bars run from the step at which training began to the one it reached; dashed: what does not count.</p>'
    return f"{_lanes(lanes, report.last_step)}{note}{table}{common}"


def _lanes(lanes: Sequence[tuple[str, int, int, int, str]], last_step: int) -> str:
    """Starts as bars over steps, oldest first. lanes: (name, first step, step it counts to, step it reached, words)."""
    rows = []
    for name, first, kept, reached, words in lanes:
        start, middle, end = (min(max(step / last_step, 0.0), 1.0) for step in (first, kept, reached))
        bar = f'<i class="kept" style="left:{start:.2%};width:{middle - start:.2%}"></i>'
        bar += f'<i class="gone" style="left:{middle:.2%};width:{end - middle:.2%}"></i>' if end > middle else ""
        rows.append(f'<li title="{escape(words)}"><span>{escape(name)}</span><div>{bar}</div></li>')
    return f'<ol class="lanes">{"".join(rows)}</ol>'


def _lane_words(start: RunStart) -> str:
    gone = f"; steps {start.kept:,} to {start.reached:,} do not count" if start.reached > start.kept else ""
    return f"start {start.number}, {start.when} UTC: from step {start.first_step:,} to {start.reached:,}{gone}"


def _start(before: RunStart | None, start: RunStart, differing: Sequence[str]) -> str:
    cells = []
    for key in differing:
        value = start.facts.get(key, "(absent)")
        changed = before is not None and before.facts.get(key, "(absent)") != value
        cells.append(f'<td class="changed">now {escape(value)}</td>' if changed else f"<td>{escape(value)}</td>")
    return (
        f'<tr><th scope="row" class="n">{start.number}</th><td class="n">{start.first_step:,}</td><td class="n">{start.kept:,}</td>'
        f'<td class="n">{start.reached:,}</td><td>{escape(start.when)}</td><td>{_hash(start.parent) if start.parent else "from scratch"}</td>'
        f"{''.join(cells)}</tr>"
    )


def _ledger(report: RunReport) -> str:
    if not report.ledger:
        return _absent(
            "The run has no ledger.jsonl: it was made before there was one, so nothing ties its checkpoints to their "
            "data"
        )
    lines = report.ledger
    shown, hidden = _ends(lines)
    items = "".join(
        f'<li class="{escape(one.kind)}"><span{" class=left" if one.abandoned else ""}>step {one.step:,}</span><time>{escape(one.when)}</time>'
        f"<span{' class=left' if one.abandoned else ''}>{escape(one.words)}{' (abandoned)' if one.abandoned else ''}</span></li>"
        for one in shown
    )
    note = f", of which {hidden:,} in the middle are not shown" if hidden else ""
    return (
        f'<p class="soft">{len(lines):,} lines, each chained to the one before by SHA-256, and the chain was checked{note}. Times are UTC. '
        f'"(abandoned)": does not count, because the run later returned to an earlier step.</p>'
        f'<ol class="timeline" tabindex="0" aria-label="ledger">{items}</ol>'
    )
