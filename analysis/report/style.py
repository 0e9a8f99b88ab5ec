"""The style of a run's page: one string of CSS, for light and dark, narrow and wide screens, and paper.

The page loads nothing, so its whole appearance is here; charts.js takes the colours of curves and marks from the
variables. Wide tables scroll within their own box.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d1c1a; --soft: #5f5c55; --paper: #faf9f5; --card: #ffffff; --line: #dedacf; --grid: #ebe8df;
  --band: #f1eee5; --heat: #2c7a7b; --changed: #fdf0cf; --changed-edge: #b7791f;
  --c0: #1f6f78; --c1: #b4530a; --c2: #6b3fa0; --c3: #2457a6; --c4: #8a1f4d; --c5: #4d6b12;
  --restart: #4a6fa5; --rollback: #b3261e; --skip: #8a5d00; --recipe: #6b3fa0; --defer: #5f5c55; --bad: #b3261e;
  --alert: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e5dc; --soft: #a8a499; --paper: #191918; --card: #212120; --line: #3b3a36;
  --grid: #2d2c2a; --band: #262624; --heat: #3f9c98; --changed: #43360f; --changed-edge: #d9a441;
  --c0: #62b6b7; --c1: #ef9a55; --c2: #b794e6; --c3: #7fa8ea; --c4: #e887ad; --c5: #a7c957;
  --restart: #8fb0de; --rollback: #ff8a80; --skip: #e0b34d; --recipe: #b794e6; --defer: #a8a499; --bad: #ff8a80;
  --alert: #fb923c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.6rem 1.4rem 4rem; max-width: 82rem; overflow-wrap: anywhere; }
header { margin-bottom: 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 60rem; }
a { color: var(--c0); text-underline-offset: .15em; }
a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
code, .hash { font: .86em/1.4 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
.soft { color: var(--soft); }
.status { font-weight: 600; }
.absent { color: var(--soft); font-style: italic; }
.absent code { font-style: normal; }
.warnings { border-left: .25rem solid var(--skip); padding: .2rem 0 .2rem .8rem; margin: 1rem 0; list-style: none; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .9rem 0 0; padding: 0; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: .7rem; margin: 1.1rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem .6rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; font-weight: 600; }
.tiles dd + dd { font-size: .78rem; font-weight: 400; color: var(--soft); line-height: 1.35; }
.pairs { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .15rem 1.2rem; margin: 0; }
.tiles + .pairs { margin-top: 1rem; } .pairs + .scroll { margin-top: .8rem; }
.pairs dt { color: var(--soft); max-width: 19rem; }
.pairs.many { display: block; columns: 21rem auto; column-gap: 2rem; }
.pairs.many div { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 1rem; break-inside: avoid;
  align-items: baseline; }
.pairs dd { margin: 0; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; overflow-x: clip; }
.charts .chart:first-child { grid-column: 1 / -1; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem .6rem; min-width: 0; }
.plot { height: 15rem; margin-top: .3rem; }
.charts .chart:first-child .plot { height: 24rem; }
.controls { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 .7rem; font-size: .88rem; color: var(--soft); }
.controls label { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .5rem; }
.controls select { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  padding: .1rem .3rem; }
.controls input { accent-color: var(--c0); }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  position: relative; container-type: inline-size; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem;
  overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding: 0; font-size: .84rem; }
caption span { display: block; position: sticky; left: 0; max-width: min(100cqi, 72rem); padding: .5rem .8rem .4rem; }
th, td { text-align: left; padding: .28rem .8rem; vertical-align: top; border-top: 1px solid var(--grid); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-top: 0; background: var(--card); position: sticky; top: 0; z-index: 1; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--card); }
th.n, td.n { text-align: right; }
td.text { white-space: pre-wrap; min-width: 15rem; max-width: 40rem; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
td.words { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
tr.left td, tr.left th, .timeline .left { color: var(--soft); } tr.left a { color: inherit; }
td.changed { background: var(--changed); box-shadow: inset 3px 0 0 var(--changed-edge); }
td.heat { text-align: right; background: color-mix(in srgb, var(--heat) calc(var(--v) * 55%), transparent); }
td.heat b { font-weight: 600; } td.none { color: var(--soft); text-align: center; }
.lanes { list-style: none; margin: 0 0 1rem; padding: .6rem .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font-size: .78rem; color: var(--soft); max-height: 22rem; overflow-y: auto; }
.lanes li { display: flex; align-items: center; gap: .7rem; }
.lanes span { flex: 0 0 6.2rem; white-space: nowrap; }
.lanes div { position: relative; flex: 1 1 auto; height: 1.1rem; border-left: 1px solid var(--line); border-right: 1px solid var(--line); }
.lanes i { position: absolute; top: .3rem; height: .5rem; min-width: 2px; }
.lanes .kept { background: var(--c0); }
.lanes .gone { border: 1.5px dashed var(--rollback); border-left: 0; }
.timeline { list-style: none; margin: 0; padding: .5rem 0; border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  max-height: 40rem; overflow-y: auto; font-size: .86rem; }
.timeline li { display: grid; grid-template-columns: 5.5rem 11rem minmax(0, 1fr); gap: 0 .8rem; padding: .16rem 1rem .16rem .8rem;
  border-left: 3px solid transparent; font-variant-numeric: tabular-nums; }
.timeline li > :first-child { text-align: right; }
.timeline time { color: var(--soft); white-space: nowrap; }
.timeline .start, .timeline .resume { border-left-color: var(--restart); margin-top: .4rem; font-weight: 600; }
.timeline .rollback { border-left-color: var(--rollback); font-weight: 600; } .timeline .skip { border-left-color: var(--skip); }
.timeline .recipe { border-left-color: var(--recipe); } .timeline .defer { border-left-color: var(--defer); font-weight: 600; }
footer { margin-top: 3rem; color: var(--soft); font-size: .84rem; border-top: 1px solid var(--line); padding-top: .8rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 3rem; } h1 { font-size: 1.4rem; }
  .wide { display: none; }
  .chart { padding: .6rem .4rem .4rem; } .plot { height: 13rem; } .charts .chart:first-child .plot { height: 18rem; }
  .pairs { grid-template-columns: minmax(0, 1fr); } .pairs dt { margin-top: .35rem; max-width: none; font-size: .84rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  th, td { padding: .28rem .55rem; }
  .timeline li { grid-template-columns: minmax(0, 1fr) auto; } .timeline li > :first-child { text-align: left; }
  .timeline li > :last-child { grid-column: 1 / -1; }
  .lanes span { flex-basis: 4.6rem; }
}
@media print {
  :root { --paper: #fff; } body { font-size: 11px; max-width: none; padding: 0; } nav { display: none; }
  .scroll, .timeline, .lanes { max-height: none; overflow: visible; } td, th { white-space: normal; }
  .chart, .tiles div, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
