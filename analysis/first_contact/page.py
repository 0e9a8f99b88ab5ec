"""report.html: what was proven and measured, on what machine and under which power and clocks, in one file to send."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weftrain.analysis.first_contact.findings import Finding, number
from weftrain.analysis.markup import document, escape

PAGE = "report.html"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100%; }
td, th { border-bottom: 1px solid #8886; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
.bad { color: #c62828; font-weight: 600; } .good { color: #2e7d32; } .none { color: #888; }
pre { overflow-x: auto; font-size: 12px; } td.n { font-variant-numeric: tabular-nums; }
"""
_SIGNS = {True: ("good", "good"), False: ("bad", "bad"), None: ("none", "not asked")}


def counts(found: Sequence[Finding]) -> tuple[int, int, int]:
    """How many questions had a good answer, a bad one, and none. A check that did not end, or began, counts as one."""
    answers = [one.ok for one in found if one.what or one.ok is not True]
    return answers.count(True), answers.count(False), sum(answer is None for answer in answers)


def page_html(found: Sequence[Finding]) -> str:
    """The page of all findings."""
    good, bad, unasked = counts(found)
    asked = [one for one in found if one.what]
    parts = [
        "<h1>weftrain on this GPU</h1>",
        f'<p class="{"bad" if bad else "good"}">{good} answers good, {bad} bad, {unasked} not asked.</p>',
        _table(_machine(found)),
        _answers("What failed", [one for one in found if one.ok is False]),
        _figures(asked),
        _device(found),
        _answers("All questions", asked),
        "<h2>Details</h2>",
        *(_details(one) for one in found if one.details),
    ]
    return document("weftrain on this GPU", _STYLE, "".join(parts))


def _machine(found: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Rows that say on what the figures were taken."""
    about = next((one.details for one in found if one.what == "versions and conditions"), {})
    own, libraries = about.get("weftrain", {}), about.get("libraries", {})
    yield "device", str(about.get("device", "unknown: the check `machine` did not run"))
    for gpu in about.get("gpu", ()) if isinstance(about.get("gpu"), list) else ():
        yield (
            f"GPU {gpu.get('index', '')}",
            ", ".join(f"{name} {value}" for name, value in gpu.items() if name != "index"),
        )
    names = ("capability", "multiprocessors", "device_memory_bytes", "cuda", "cudnn", "nccl", "cpu", "cpu_count")
    for name in (*names, "memory_bytes", "virtualisation", "system", "python"):
        if name in about:
            yield name.replace("_", " "), number(about[name])
    yield (
        "libraries",
        ", ".join(f"{name} {version}" for name, version in libraries.items() if version != "not installed"),
    )
    changed = {True: ", changed since", False: ""}.get(own.get("dirty"), "")
    yield "weftrain", f"{own.get('version', 'unknown')}, commit {own.get('commit', 'unknown')}{changed}"
    yield "kernels of", ", ".join(about.get("kernel_sources", ()))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows) + "</table>"


def _answers(title: str, found: Sequence[Finding]) -> str:
    if not found:
        return ""
    rows = []
    for one in found:
        kind, word = _SIGNS[one.ok]
        why = str(one.details.get("why", ""))
        cells = (escape(one.check), escape(one.what or "the check itself"), f'<span class="{kind}">{word}</span>')
        rows.append(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, escape(why), f"{one.seconds:.1f} s")) + "</tr>"
        )
    head = "<tr><th>check</th><th>question</th><th>answer</th><th>why</th><th>took</th></tr>"
    return f"<h2>{escape(title)}</h2><table>{head}{''.join(rows)}</table>"


def _figures(found: Sequence[Finding]) -> str:
    rows = [
        f"<tr><td>{escape(one.check)}</td><td>{escape(one.what)}</td><td>{escape(name)}</td>"
        f'<td class="n">{escape(number(value))}</td></tr>'
        for one in found
        for name, value in one.figures.items()
    ]
    head = "<tr><th>check</th><th>question</th><th>quantity</th><th>value</th></tr>"
    return f"<h2>Figures</h2><table>{head}{''.join(rows)}</table>" if rows else ""


def _device(found: Sequence[Finding]) -> str:
    """Power, clocks and temperature while each timed check ran."""
    rows: list[str] = []
    for one in found:
        device: Mapping[str, Mapping[str, float]] = one.details.get("device", {}) if not one.what else {}
        for name, spread in device.items():
            told = " / ".join(number(spread[key]) for key in ("least", "median", "greatest"))
            rows.append(f"<tr><td>{escape(one.check)}</td><td>{escape(name)}</td><td>{escape(told)}</td></tr>")
    head = "<tr><th>check</th><th>quantity</th><th>least / median / greatest</th></tr>"
    return f"<h2>The device while it was timed</h2><table>{head}{''.join(rows)}</table>" if rows else ""


def _details(one: Finding) -> str:
    text = json.dumps(_lines(one.details), indent=1)
    return f"<details><summary>{escape(one.check)}: {escape(one.what)}</summary><pre>{escape(text)}</pre></details>"


def _lines(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
