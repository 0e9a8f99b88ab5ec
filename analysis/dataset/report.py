"""A dataset's report: one self-contained HTML page without script, drawn from DatasetStats.

Names and tokens come from the text and are escaped where they enter the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from weftrain.analysis.dataset.stats import LENGTH_EDGES, DatasetStats, stats_lines
from weftrain.analysis.markup import document, escape
from weftrain.core.formats import fsops

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --soft: #6b6a64; --paper: #fbfaf7; --bar: #2f6f73; --line: #dcd9cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e6dd; --soft: #a09d92; --paper: #1b1b19; --bar: #6fb3b0; --line: #3a3935; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1.2rem;
  max-width: 66rem; }
h1 { font-size: 1.5rem; margin: .2rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .15rem .6rem .15rem 0; vertical-align: middle; overflow-wrap: break-word; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.b { width: 45%; min-width: 5rem; }
.bar { height: .8rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { white-space: pre-wrap; margin: 0; }
.soft { color: var(--soft); }
svg { width: 100%; height: auto; }
@media (max-width: 36rem) { td.b { width: 30%; min-width: 2.5rem; } td, th { padding-right: .35rem; } }
"""


def write_report(stats: DatasetStats, decode: Callable[[int], str], path: Path) -> None:
    """Write the page. decode: the text of a token id. Raises OSError."""
    fsops.write_bytes(path, report_html(stats, decode).encode())


def report_html(stats: DatasetStats, decode: Callable[[int], str]) -> str:
    """The page as text."""
    manifest = stats.manifest
    sections = [
        _section("In short", f"<pre><code>{escape(chr(10).join(stats_lines(stats)))}</code></pre>"),
        _section("Tokens by source", _bars(_sources(stats), "source", "tokens")),
        _section("Document lengths", _bars(_lengths(stats), "tokens", "documents")),
        _section("Documents", _bars(_documents(stats), "", "documents")),
    ]
    if stats.fim:
        sections.append(_section("Fill-in-the-middle", _bars(list(stats.fim.items()), "form", "documents")))
    sections += [
        _section("Token frequency", _zipf(stats.token_counts)),
        _section("Commonest tokens", _commonest(stats, decode)),
        _section("Chain", _chain(stats)),
    ]
    title = f"{manifest.name}: {stats.set_name}"
    return document(title, _STYLE, f"<h1>{escape(title)}</h1>{''.join(sections)}")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _bars(rows: Sequence[tuple[str, int]], left: str, right: str) -> str:
    most, total = max((count for _, count in rows), default=1) or 1, sum(count for _, count in rows) or 1
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="b"><div class="bar" style="width:{count / most:.2%}"></div></td>'
        f'<td class="n">{count:,}</td><td class="n soft">{count / total:.2%}</td></tr>'
        for name, count in rows
    )
    return f'<table><tr><th>{escape(left)}</th><th></th><th class="n">{escape(right)}</th><th class="n">share</th></tr>{lines}</table>'


def _sources(stats: DatasetStats) -> list[tuple[str, int]]:
    others = [(f"{stats.other_sources:,} more", stats.other_tokens)] if stats.other_sources else []
    return [*stats.tokens_by_source.items(), *others]


def _lengths(stats: DatasetStats) -> list[tuple[str, int]]:
    filled = np.flatnonzero(stats.length_counts)
    if not len(filled):
        return []
    span = range(int(filled[0]), int(filled[-1]) + 1)
    return [
        (f"{LENGTH_EDGES[index]:,} to {LENGTH_EDGES[index + 1] - 1:,}", int(stats.length_counts[index]))
        for index in span
    ]


def _documents(stats: DatasetStats) -> list[tuple[str, int]]:
    counts = stats.manifest.documents
    return [
        ("trained on", counts.train),
        ("held out", counts.heldout),
        ("duplicates, dropped", counts.duplicates),
        ("failed", counts.failed),
    ]


def _zipf(token_counts: np.ndarray) -> str:
    """Frequency against rank, both logarithmic: natural text falls along a line."""
    counts = np.sort(token_counts[token_counts > 0])[::-1]
    if len(counts) < 2:
        return ""
    ranks = np.unique(np.geomspace(1, len(counts), 120).astype(int))
    x = 40 + 550 * np.log(ranks) / np.log(len(counts))
    top = np.log(counts[0])
    y = 10 + 180 * (1 - np.log(counts[ranks - 1]) / max(top, 1e-9))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    unused = int((token_counts == 0).sum())
    return (
        '<svg viewBox="0 0 600 215" role="img" aria-label="frequency of each token against its rank">'
        '<polyline fill="none" stroke="var(--line)" points="40,10 40,190 590,190"/>'
        f'<polyline fill="none" stroke="var(--bar)" stroke-width="2" points="{points}"/>'
        f'<g fill="var(--soft)" font-size="11"><text x="590" y="24" text-anchor="end">the commonest: {counts[0]:,} times</text>'
        f'<text x="40" y="205">rank 1</text><text x="590" y="205" text-anchor="end">rank {len(counts):,}</text></g></svg>'
        f'<p class="soft">{unused:,} of {len(token_counts):,} ids do not occur.</p>'
    )


def _commonest(stats: DatasetStats, decode: Callable[[int], str]) -> str:
    order = np.argsort(-stats.token_counts, kind="stable")[:30]
    total = stats.token_counts.sum()
    cells = "".join(
        f'<tr><td class="n soft">{index}</td><td><code>{escape(repr(decode(int(index))))}</code></td>'
        f'<td class="n">{stats.token_counts[index]:,}</td><td class="n soft">{stats.token_counts[index] / total:.2%}</td></tr>'
        for index in order
        if stats.token_counts[index]
    )
    return f'<table><tr><th class="n">id</th><th>text</th><th class="n">times</th><th class="n">share</th></tr>{cells}</table>'


def _chain(stats: DatasetStats) -> str:
    """What follows from what, by hashes."""
    manifest = stats.manifest
    entry = manifest.sets["train" if stats.set_name == "train" else "heldout"]
    rows = [
        (f"{manifest.corpus.files:,} input files (inputs.jsonl)", manifest.inputs_sha256),
        (f"{manifest.num_sources:,} sources (sources.jsonl)", manifest.sources_sha256),
        *((f"grew from {parent.name}, dataset id of its training set", parent.train.id) for parent in manifest.parents),
        ("corpus, the root over their bytes", manifest.corpus.sha256),
        ("tokenizer.json", manifest.tokenizer_sha256),
        *((f"{shard.file}, {shard.n_examples:,} rows", shard.digest) for shard in entry.shards[:12]),
        *([(f"and {len(entry.shards) - 12:,} shards more", "")] if len(entry.shards) > 12 else []),
        (f"dataset id of {stats.set_name}, the root over its shards", entry.id),
    ]
    lines = "".join(f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"
