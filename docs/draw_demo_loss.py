"""docs/demo-loss.svg: training and held-out loss of a run, for the README.

python docs/draw_demo_loss.py runs/crystal_demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from weftrain.core.run.metrics import read_metrics

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "weftrain", "font.size": 9})


def draw(run: Path, to: Path) -> None:
    """Loss by step on a logarithmic axis, in colours that read on light and dark pages."""
    from matplotlib import pyplot

    records = read_metrics(run)
    steps = [record for record in records if record["kind"] == "step"]
    heldout = [record for record in records if record["kind"] == "evaluation"]
    grey = "#808080"
    figure, axes = pyplot.subplots(figsize=(7, 2.4))
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#3b82c4", linewidth=1.2, label="training")
    axes.plot([r["step"] for r in heldout], [r["loss"] for r in heldout], "o-", color="#e07b39", label="held out")
    axes.set_yscale("log")
    axes.set_yticks([4, 5, 7, 9, 14, 20, 28], labels=["4", "5", "7", "9", "14", "20", "28"])
    axes.minorticks_off()
    axes.set_xlabel("step", color=grey)
    axes.set_ylabel("loss (nats a token)", color=grey)
    axes.tick_params(colors=grey)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(grey)
    legend = axes.legend(frameon=False, labelcolor=grey)
    assert legend is not None
    figure.tight_layout()
    figure.savefig(to, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_name("demo-loss.svg"))
