"""The page of an audit: what was found, where in the series, and the norms of a sample where one was read.

It holds no script: the strip of revisions and the curves are SVG, and names and evidence, which come from whoever
published the series, go through `escape`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from weftrain.analysis.markup import document, escape
from weftrain.analysis.report.style import STYLE
from weftrain.exchange.audit.audit import Audit, Point
from weftrain.exchange.audit.findings import MEANING, Finding, named

MAX_ROWS = 2000  # of findings
_MAX_MARKS = 2000  # of the strip, and points of a curve
_WIDTH, _HEIGHT = 1000, 160
_OWN_STYLE = """
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
svg .good { fill: var(--c0); } svg .bad { fill: var(--bad); } svg path { fill: none; stroke: var(--c0); stroke-width: 1.5; }
svg text { fill: var(--soft); font-size: 11px; }
"""
_DEPTHS = {
    "listing": "Lists of files with their hashes were read, and no file.",
    "headers": "Lists of files, headers of weights and configs were read, and no weights.",
    "deep": "Lists of files, headers, configs and a sample of the weights were read.",
}


def audit_html(found: Audit) -> str:
    """The page as text."""
    count = len(found.findings)
    status = f"{count:,} finding{'' if count == 1 else 's'}" if count else "no mistake found"
    head = (
        f'<h1>{escape(found.series)}</h1><p><span class="status">{status}</span> in {len(found.revisions):,} '
        f'revisions</p><p class="soft">{escape(found.kind)}. {_DEPTHS[found.depth]}</p>'
    )
    sections = [
        ("Where", _strip(found)),
        ("Findings", _findings(found.findings)),
        ("What the series holds", _facts(found)),
        ("Curves", "".join(_curves(found.points))),
    ]
    body = "".join(f"<section><h2>{title}</h2>{part}</section>" for title, part in sections if part)
    foot = (
        "<footer>Hashes, headers and configs are those that the publisher serves. An audit shows mistakes; that "
        "states were trained as it says, only training them again shows.</footer>"
    )
    return document(f"{found.series}: audit", STYLE + _OWN_STYLE, f"<header>{head}</header><main>{body}</main>{foot}")


def _strip(found: Audit) -> str:
    """A mark for each revision in order, those with a finding in another colour."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for finding in found.findings:
        for name in finding.revisions:
            kinds[name].append(finding.kind)
    shown = _thin(found.revisions, set(kinds))
    step = _WIDTH / max(1, len(shown))
    marks = []
    for index, name in enumerate(shown):
        words = f"{name}: {', '.join(dict.fromkeys(kinds[name]))}" if name in kinds else name
        state = "bad" if name in kinds else "good"
        marks.append(
            f'<rect class="{state}" x="{index * step:.2f}" y="{4 if state == "bad" else 12}" width="{max(0.5, step * 0.8):.2f}" '
            f'height="{32 if state == "bad" else 16}"><title>{escape(words)}</title></rect>'
        )
    label = f"{len(found.revisions):,} revisions in the order of their steps, {len(kinds):,} of them in findings"
    hidden = len(found.revisions) - len(shown)
    left_out = f" {hidden:,} revisions without a finding are not shown." if hidden else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} 40" preserveAspectRatio="none" role="img" aria-label="{label}" '
        f'style="height:3rem">{"".join(marks)}</svg>'
        f'<p class="soft">{label}.{left_out}</p>'
    )


def _thin(names: Sequence[str], kept: set[str]) -> list[str]:
    every = max(1, math.ceil(len(names) / _MAX_MARKS))
    return [name for index, name in enumerate(names) if index % every == 0 or name in kept][: 2 * _MAX_MARKS]


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="absent">Nothing that contradicts names, configs or neighbours was seen.</p>'
    counted = ", ".join(f"{count:,} {kind}" for kind, count in Counter(one.kind for one in findings).most_common())
    rows = [
        f'<tr><th scope="row">{escape(one.kind)}</th><td class="words">{escape(named(one.revisions))}</td>'
        f'<td class="words">{escape(one.evidence)}</td><td>{escape(one.found_by)}</td>'
        f'<td class="words">{escape(MEANING[one.kind])}</td></tr>'
        for one in findings[:MAX_ROWS]
    ]
    more = f" The first {MAX_ROWS:,} are shown." if len(findings) > MAX_ROWS else ""
    return _table(f"{counted}.{more}", ("kind", "revisions", "evidence", "seen by", "what it means"), rows)


def _facts(found: Audit) -> str:
    rows = [
        f'<tr><th scope="row">{escape(one.name)}</th><td>{escape(one.status)}</td>'
        f'<td class="words">{escape(one.evidence)}</td></tr>'
        for one in found.facts
    ]
    return _table("What is there, and what is not.", ("", "", "seen"), rows)


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(head[0] or "facts")}"><table><caption><span>'
        f"{escape(caption)}</span></caption><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(points: Sequence[Point]) -> list[str]:
    """A curve of norms and one of distances between neighbours for each part of the training."""
    parts: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        parts[point.part].append(point)
    found = []
    for part, some in parts.items():
        where = f" of {part}" if part else ""
        norms = [(one.step, one.norm) for one in some if one.norm is not None]
        moves = [(one.step, one.move) for one in some if one.move is not None]
        found += [
            _curve(f"root mean square of the sample{where}", norms),
            _curve(f"distance to the revision before, as a share of the norm{where}", moves),
        ]
    return [curve for curve in found if curve]


def _curve(title: str, points: Sequence[tuple[int, float]]) -> str:
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) < 2:
        return ""
    every = max(1, math.ceil(len(points) / _MAX_MARKS))
    points = [*points[::every], points[-1]]
    first, last = points[0][0], points[-1][0]
    low, high = min(value for _, value in points), max(value for _, value in points)
    across, up = (_WIDTH - 20) / max(1, last - first), (_HEIGHT - 40) / ((high - low) or 1.0)
    line = " ".join(
        f"{10 + (step - first) * across:.1f},{_HEIGHT - 20 - (value - low) * up:.1f}" for step, value in points
    )
    label = f"{title}: {low:.4g} to {high:.4g}, from step {first:,} to {last:,}"
    return (
        f'<h3>{escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<path d="M{line}"/><text x="10" y="14">{high:.4g}</text><text x="10" y="{_HEIGHT - 5}">{low:.4g} at the '
        f"bottom; steps {first:,} to {last:,}</text></svg>"
    )
