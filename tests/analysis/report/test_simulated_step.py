"""The picture of a simulated step: every slice in the trace, and a page that is well-formed and runs no script."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from weftrain.analysis.report.simulated_step import Picture, Row, Slice, page, trace

# a thousand slices of half a pixel or less, so that neighbours are drawn as one
FORWARDS = [Slice(f"forward of layer {number}", number * 1e-3, (number + 1) * 1e-3) for number in range(1000)]
FOUND = Picture(
    [
        Row(0, "compute", [*FORWARDS, Slice("backward of layer 3", 1.0, 3.0)]),
        Row(0, "shard", [Slice("gather layer 1", 0.0, 0.25), Slice("scatter gradients of layer 1", 3.0, 4.0)]),
        Row(1, "compute", [Slice("optimizer", 3.5, 4.0)]),
    ],
    [[(0.0, 10 << 30), (1.0, 20 << 30), (3.0, 10 << 30)], [(0.0, 1 << 30)]],
)


def test_every_slice_is_in_the_trace() -> None:
    events = json.loads(trace(FOUND))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 1000 + 1 + 2 + 1
    assert slices[1000] == {
        "ph": "X",
        "pid": 0,
        "tid": 0,
        "name": "backward of layer 3",
        "cat": "compute",
        "ts": 1e6,
        "dur": 2e6,
    }
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"device of stage 0", "device of stage 1"}
    held = [event["args"]["bytes"] for event in events if event["ph"] == "C" and event["pid"] == 0]
    assert held == [10 << 30, 20 << 30, 10 << 30]


def test_the_page_is_well_formed_and_escaped() -> None:
    text = page(FOUND, "<b>", [("step", "<1 s>")], ["a & b"])
    root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    bars = root.findall("rect")
    assert 50 < len(bars) < 200
    assert max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars) < 190 + 1200 + 1
    covered = sum(float(bar.get("width", 0)) for bar in bars if bar.get("fill") == "#56b4e9")
    assert 299 < covered < 301  # a quarter of the width
    assert "memory, 20.00 GiB at most" in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "<script" not in text
