"""The checks in the order in which they run: cheap proofs first, several at a time; then what is timed, alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weftrain.analysis.first_contact import proofs, speed
from weftrain.analysis.first_contact.command_line import command_line
from weftrain.analysis.first_contact.conditions import Conditions
from weftrain.analysis.first_contact.findings import Findings
from weftrain.analysis.first_contact.machine import machine


@dataclass(frozen=True)
class Check:
    """One process. limit_s: after which it is ended. alone: nothing else runs meanwhile, so that it can be timed."""

    name: str
    run: Callable[[Conditions, Findings], None]
    limit_s: float
    alone: bool
    summary: str


_ALL = (
    Check("machine", machine, 40, True, "versions, clocks, and the ceilings that the rest is judged by"),
    Check(
        "kernels attention", proofs.kernels("attention"), 120, False, "every source against float64, same bits twice"
    ),
    Check(
        "kernels norms",
        proofs.kernels("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"),
        90,
        False,
        "every source against float64, same bits twice",
    ),
    Check(
        "kernels optimizer",
        proofs.kernels("adamw", "grad_norm", "rope", "swiglu", "newton_schulz", "grouped_gemm"),
        90,
        False,
        "every source against float64, same bits twice",
    ),
    Check(
        "kernels losses",
        proofs.kernels("cross_entropy", "linear_cross_entropy"),
        90,
        False,
        "every source against float64, same bits twice",
    ),
    Check("parity", proofs.parity, 80, False, "losses on the GPU against the reference on the CPU, fp32 and bf16"),
    Check("bits", proofs.bits, 80, False, "the same bits twice, compiled too, and a run continued from its state"),
    Check("streaming", proofs.streaming, 80, False, "every gradient of a streamed step bit for bit that of local"),
    Check("ranks", proofs.ranks, 120, False, "the cuda backend over NCCL with one rank: each layout and option"),
    Check("command line", command_line, 100, False, "prep, train, release, verify, and a replay of its links"),
    Check("kernel speed", speed.kernel_speed, 80, True, "each source's share of the roofline at the shapes of 7B"),
    Check("1.2B", speed.throughput("1.2B"), 90, True, "tokens/s of whole steps at 4,096 tokens, in several settings"),
    Check("profile", speed.profile, 30, True, "where the time of a 1.2B step goes"),
    Check("7B", speed.throughput("7B"), 100, True, "tokens/s of whole steps of Amber-7B, in several settings"),
    Check("stream speed", speed.stream_speed, 60, True, "tokens/s of twelve layers of 7B by weight streaming"),
)
CHECKS = {check.name: check for check in _ALL}
