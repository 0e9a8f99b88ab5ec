"""The picture of a kernel benchmark draws the shares that were measured."""

from __future__ import annotations

import pytest
import torch

from weftrain.analysis.figure import new_figure, picture
from weftrain.kernels.bench.measure import bench
from weftrain.kernels.bench.plot import bars, draw_shares
from weftrain.kernels.bench.report import KernelBenchReport
from weftrain.kernels.bench.roofline import Machine, Rate


def test_the_plot_draws_what_was_measured() -> None:
    pytest.importorskip("matplotlib")
    rate = Rate(1e12, "by hand", "FLOP")
    known = Machine(rate, rate, rate, rate, 4096, "by hand", "cpu")
    report = bench(["swiglu", "grad_norm"], ["reference", "torch"], "small", torch.float32, repeats=2, machine=known)
    drawn = bars(report)
    assert {label: sorted(by_source) for label, by_source in drawn.items()} == {
        "swiglu\nodd": ["reference", "torch"],
        "grad_norm\nodd": ["reference", "torch"],
    }
    assert drawn["swiglu\nodd"]["torch"].direction == "forward+backward"
    assert drawn["grad_norm\nodd"]["torch"].direction == "forward"
    for one in (report, KernelBenchReport(report.environment)):
        figure = new_figure(1, 1)
        draw_shares(one, figure)
        assert picture(figure).startswith(b"\x89PNG")
