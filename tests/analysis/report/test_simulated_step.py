"""The picture of a simulated step: every task in the trace, and a page that is well-formed and runs no script."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from weftrain.analysis.machine.devices import DEVICES, speeds
from weftrain.analysis.report.simulated_step import page, rows, trace
from weftrain.backends.cuda.simulation.layout import Layout
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.backends.cuda.simulation.step import Simulated, simulate
from weftrain.backends.cuda.simulation.work import Program
from weftrain.core.recipe_file import load_recipe


@pytest.fixture(scope="module")
def found() -> Simulated:
    recipe = load_recipe("llama32_1b", ["batch.replicas=8", "batch.global_batch_size=64"], "cuda").recipe
    layout = Layout(2, 4, pipeline=2)
    return simulate(recipe, layout, Program(), Rates.of(speeds(16, DEVICES["H100"])))


def test_every_task_is_in_the_trace(found: Simulated) -> None:
    events = json.loads(trace(found))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(found.tasks)
    assert sum(event["dur"] for event in slices) == pytest.approx(
        sum(span.end_s - span.start_s for span in found.spans) * 1e6, rel=1e-3
    )
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    assert names == {"device of stage 0", "device of stage 1"}
    held = [event["args"]["bytes"] for event in events if event["ph"] == "C" and event["pid"] == 1]
    assert max(held) == found.memory[1].peak_bytes


def test_the_page_is_well_formed_and_escaped(found: Simulated) -> None:
    text = page(found, "<b>", {"step": "<1 s>"}, ["a & b"])
    picture = text[text.index("<svg") : text.index("</svg>") + 6]
    root = ElementTree.fromstring(picture)
    bars = root.findall("rect")
    assert len(bars) > 50
    assert max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars) < 190 + 1200 + 1
    streams = [row.stream for row in rows(found) if row.device == 0]
    assert streams == ["compute", "replicate", "send to 1", "shard"]
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "<script" not in text
