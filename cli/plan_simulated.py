"""`weftrain plan --simulate`: a simulated step of the cuda backend, with what it assumes, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from weftrain.cli.resolve import Resolved
from weftrain.core.formats.units import gb, gib

if TYPE_CHECKING:
    from weftrain.analysis.report.simulated_step import Picture
    from weftrain.backends.cuda.simulation.step import Simulated
    from weftrain.core.prediction import Speeds

SUFFIXES = (".html", ".json")


def check_timeline(timeline: Path | None, simulate: bool) -> None:
    """Raises UsageError for a picture that nothing would draw, or of an unknown kind."""
    if timeline is None:
        return
    if not simulate:
        raise click.UsageError("--timeline has no effect without --simulate: leave it out, or add --simulate")
    if timeline.suffix not in SUFFIXES:
        raise click.UsageError(f"--timeline {timeline}: name a file that ends in .html or, for Perfetto, in .json")


def simulated(found: Resolved, speeds: Speeds) -> Simulated:
    """Raises BackendError for another backend, and for what is not simulated."""
    from weftrain.backends.cuda.options import CudaOptions
    from weftrain.backends.cuda.planner import degrees_of
    from weftrain.backends.cuda.simulation.layout import layout_of, program_of
    from weftrain.backends.cuda.simulation.rates import Rates
    from weftrain.backends.cuda.simulation.step import simulate
    from weftrain.core.errors import BackendError

    recipe, backend, options = found
    if not isinstance(options, CudaOptions):
        raise BackendError(f"--simulate: the steps of the {backend.name} backend are not simulated: add --backend cuda")
    layout = layout_of(recipe, options, degrees_of(recipe, options, speeds))
    return simulate(recipe, layout, program_of(recipe, options), Rates.of(speeds))


def table(found: Simulated, tokens: int) -> Table:
    """tokens: of a step."""
    shown = Table("", "", box=None, show_header=False)
    for name, value in facts(found, tokens):
        shown.add_row(name, value)
    return shown


def facts(found: Simulated, tokens: int) -> list[tuple[str, str]]:
    """What is printed, with its name: the optimizer has a time and memory."""
    from weftrain.backends.cuda.simulation.step import WAITS

    size, stages = found.layout.size, len(found.devices)
    rate = tokens / found.step_s
    told = [("step, simulated", f"{found.step_s:,.3f} s = {rate:,.0f} tokens/s, {rate / size:,.1f} a device")]
    slowest = max(found.devices, key=lambda times: found.step_s - times["pipeline"])
    for name, seconds in slowest.items():
        if seconds > 0.0005 * found.step_s:
            waited = f"  waits for {'other stages' if name == 'pipeline' else name}"
            told.append((waited if name in WAITS else f"  {name}", f"{seconds:,.3f} s, {seconds / found.step_s:.1%}"))
    if stages > 1:
        told.append(("pipeline bubble", f"{found.bubble:.1%} of the step, on average over {stages} stages"))
    told += [(f"link of {stream} ranks busy", f"{seconds:,.3f} s") for stream, seconds in _links(found).items()]
    peak = max(found.memory, key=lambda memory: memory.peak_bytes)
    told.append(("memory, at most", gib(peak.peak_bytes)))
    return told + [(f"  {part}", gib(held)) for part, held in peak.peak.items()]


def _links(found: Simulated) -> Mapping[str, float]:
    return {name: seconds for name, seconds in found.links[0].items() if not name.startswith("send") and seconds}


def assumptions(found: Simulated) -> list[str]:
    """Every number that is not of the recipe, in sentences."""
    rates, program, layout = found.rates, found.program, found.layout
    kernels = rates.kernels
    recomputed = ", ".join(
        f"{share:.0%} of {what}"
        for share, what in zip(program.recomputed, ("products", "attention", "elementwise passes"), strict=True)
    )
    lines = [
        f"Large products run at {kernels.matmul:.0%} of {rates.matmul_flops / 1e12:,.1f} TFLOP/s"
        + (f", less where tiles do not fill {kernels.processors} processors." if kernels.processors > 1 else "."),
        f"Attention runs at {kernels.attention_forward:.0%} of it forward and {kernels.attention_backward:.0%} "
        "backward, counting the products under the mask.",
        f"Elementwise kernels read and write at {rates.bandwidth_share:.0%} of {gb(rates.memory_bandwidth)}/s; "
        f"how many there are: '{program.fusion}', with a residual stream of {program.stream_item} bytes an "
        "element.",
        f"Backward computes again {recomputed}.",
        f"While a collective runs, computation on its device loses {rates.slowdown:.0%} of its rate.",
        "Rings; no rank is late; no time for data, Python, checkpoints or evaluation.",
    ]
    if layout.size > 1:
        node, network = rates.node_bandwidth, rates.network_bandwidth
        told = [f"{rates.node_share:.0%} of {gb(node)}/s within a node" if node else ""]
        told += [f"{rates.network_share:.0%} of {gb(network)}/s a device between nodes" if network else ""]
        lines.append(
            f"Links reach {' and '.join(part for part in told if part)}, of {rates.devices_per_node} devices each; a "
            f"step of a ring takes {rates.node_hop_s * 1e6:.0f} us within and {rates.network_hop_s * 1e6:.0f} us "
            "between."
        )
    if found.simulated_micro_batches < found.micro_batches:
        lines.append(
            f"{found.simulated_micro_batches} of {found.micro_batches} micro-batches are simulated; each further one "
            "takes as long as the last of them adds."
        )
    return lines


def as_json(found: Simulated) -> dict[str, object]:
    return {
        "step_s": found.step_s,
        "devices": found.layout.size,
        "micro_batches": found.micro_batches,
        "simulated_micro_batches": found.simulated_micro_batches,
        "stages_s": [dict(times) for times in found.devices],
        "links_s": [dict(times) for times in found.links],
        "bubble": found.bubble,
        "peak_memory_bytes": [dict(memory.peak) for memory in found.memory],
        "assumptions": assumptions(found),
    }


def picture(found: Simulated) -> Picture:
    """Of each device, computation first, then its links."""
    from weftrain.analysis.report.simulated_step import Picture, Row, Slice
    from weftrain.backends.cuda.simulation.events import COMPUTE

    streams: dict[tuple[int, bool, str], list[Slice]] = {}
    for task, span in zip(found.tasks, found.spans, strict=True):
        place = (task.device, task.stream != COMPUTE, task.stream)
        streams.setdefault(place, []).append(Slice(task.name, span.start_s, span.end_s))
    rows = [Row(place[0], place[2], streams[place]) for place in sorted(streams)]
    return Picture(rows, [memory.curve for memory in found.memory])


def write_timeline(found: Simulated, path: Path, title: str, tokens: int) -> None:
    """An HTML page or a trace, by the suffix. Raises an OSError's one line where it cannot be written."""
    from weftrain.analysis.report.simulated_step import page, trace
    from weftrain.core.formats import fsops

    if path.suffix == ".json":
        fsops.write_bytes(path, trace(picture(found)))
    else:
        fsops.write_bytes(path, page(picture(found), title, facts(found, tokens), assumptions(found)).encode())
