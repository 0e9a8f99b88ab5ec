"""`weftrain timeline`: where a streaming run's first steps spent their time, as a table, a picture and a TensorBoard
image.

Nothing is measured here: the run must have recorded trace.json, which it does only when asked to.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from weftrain.cli import remote
from weftrain.cli.display import Console, drawing


@click.command()
@remote.run
def timeline(run: Path) -> None:
    """Show how busy compute and disk were in RUN, and for how long it stalled, from its trace.json.

    backend.options.trace_steps=3 records one.
    """
    from weftrain.analysis.report.timeline import (
        MOVING,
        OVERLAP,
        TRACE,
        TRACKS,
        add_to_tensorboard,
        busy,
        draw,
        read_trace,
    )
    from weftrain.analysis.tracking.tensorboard import TENSORBOARD

    trace, picture = run / TRACE, run / "timeline.png"
    slices = read_trace(trace)
    figures = busy(slices)
    whole = max((one.end_ms for one in slices), default=0.0)
    table = Table("track", "busy ms", "of the whole", "slices", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for track in TRACKS:
        share = f"{figures[track] / whole:.1%}" if whole else "-"
        table.add_row(track, f"{figures[track]:,.1f}", share, f"{sum(one.track == track for one in slices):,}")
    console = Console()
    console.print(table)
    moved = any(figures[track] for track in MOVING)
    overlap = (
        f"{figures[OVERLAP]:.1%} of the time of reads, writes and spools lies under computation that was not stalled"
    )
    console.print(
        f"whole        {whole:,.1f} ms\noverlap      {overlap if moved else 'nothing was read, written or spooled'}"
    )
    console.print(f"by hand      open {trace} at https://ui.perfetto.dev")
    with drawing():
        add_to_tensorboard(draw(slices, picture), run)
        console.print(f"picture      {picture}")
        console.print(f"tensorboard  tensorboard --logdir {run / TENSORBOARD}   (Images)")
