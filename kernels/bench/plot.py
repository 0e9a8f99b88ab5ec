"""The picture of a kernel benchmark: the share of the roofline that each source reaches, op by op.

A bar is a share of what *this* machine could do, so bars of two machines do not say which is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weftrain.kernels.bench.report import KernelBenchReport, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bars(report: KernelBenchReport) -> dict[str, dict[str, Measurement]]:
    """Op and example -> source -> what is drawn: with the backward if there is one, and only known shares."""
    drawn: dict[str, dict[str, Measurement]] = {}
    for one in report.measurements:
        if one.roofline_share is None or one.direction == "backward":
            continue
        by_source = drawn.setdefault(f"{one.op}\n{one.example}", {})
        if one.source not in by_source or one.direction == "forward+backward":
            by_source[one.source] = one
    return drawn


def draw_shares(report: KernelBenchReport, figure: Figure) -> None:
    """Draw the bars into an empty figure, whose size follows from their number."""
    drawn = bars(report)
    sources = sorted({source for by_source in drawn.values() for source in by_source})
    width = 0.8 / max(len(sources), 1)
    figure.set_size_inches(max(6.0, 1.6 * len(drawn)), 4.5)
    axes = figure.add_subplot()
    for index, source in enumerate(sources):
        places, shares, below, above = [], [], [], []
        for place, by_source in enumerate(drawn.values()):
            one = by_source.get(source)
            if one is None or one.roofline_share is None or one.ideal_ms is None:
                continue
            places.append(place + (index - (len(sources) - 1) / 2) * width)
            shares.append(one.roofline_share)
            below.append(one.roofline_share - one.ideal_ms / one.high_ms)
            above.append(one.ideal_ms / one.low_ms - one.roofline_share)
        axes.bar(places, shares, width, yerr=(below, above), capsize=2, label=source)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(drawn)), list(drawn))
    axes.set_ylabel("share of the roofline (ideal / measured time)")
    environment = report.environment
    axes.set_title(
        f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}, suite "
        f"{environment['suite']}"
    )
    if sources:
        axes.legend(fontsize="small")
