"""A score: faults of every kind, each a wrong implementation around a right one, and the check that catches it.

The examples of an op hide most of these. `test_the_score` runs all of them and is the claim that `weftrain kernels
check` makes; the quick suite takes one of each kind. That what is right is not caught stands in test_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import planted
import pytest
import torch

from weftrain.kernels import OPS, Implementation, reference
from weftrain.kernels.checks import CheckReport, run_checks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LEAST_CAUGHT = 0.95


@dataclass(frozen=True)
class Fault:
    """A fault is caught where the check that is named fails, in these words."""

    kind: str
    op: str
    function: Callable[..., Any]
    check: str
    words: str
    dtype: torch.dtype = FP32
    thresholds: Mapping[str, int] = field(default_factory=dict)
    limit_s: float = 120.0
    quick: bool = False  # in the quick suite: the one that stands for its kind

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.op} {getattr(self.function, '__name__', 'call')}"


FAULTS = [
    Fault("numerics", "swiglu", planted.gelu_for_silu, "numerics", "output: error", quick=True),
    Fault("numerics", "attention", planted.sees_the_next_token, "numerics", "output: error"),
    Fault("numerics", "rms_norm", planted.eps_left_out, "numerics", "output: error"),
    Fault("numerics", "rope", planted.k_not_turned, "numerics", "k_turned: error"),
    Fault("numerics", "adamw", planted.eps_on_the_other_side, "numerics", "parameters: error"),
    Fault("numerics", "cross_entropy", planted.ignored_rows_counted, "numerics", "output: error"),
    Fault("numerics", "swiglu", planted.one_percent_more_gradient, "numerics", "grad_gate: error 1.00e-02"),
    Fault(
        "size", "attention", planted.first_keys_forgotten, "thresholds", "output: error", thresholds={"tokens": 1024}
    ),
    Fault("size", "attention", planted.first_keys_forgotten, "sizes", "output: error"),
    Fault(
        "size",
        "linear_cross_entropy",
        planted.last_chunk_lost,
        "thresholds",
        "grad_hidden",
        thresholds={"logits": 2**20},
        quick=True,
    ),
    Fault("size", "swiglu", planted.grid_ends, "sizes", "output: error"),
    Fault("size", "grad_norm", planted.tensor_cut, "sizes", "output: error", quick=True),
    Fault("size", "adamw", planted.list_cut, "sizes", "parameters: error"),
    Fault("size", "rms_norm", planted.weight_gradient_of_the_first_rows, "sizes", "grad_weight: error"),
    Fault("size", "cross_entropy", planted.vocabulary_cut, "sizes", "output: error"),
    Fault("size", "rms_norm", planted.offsets_of_32_bits, "offsets", "rows more than 2^31 elements apart"),
    Fault("size", "layer_norm", planted.bias_gradient_in_bf16, "accumulation", "grad_bias: error", BF16),
    Fault("size", "grad_norm", planted.squares_in_bf16, "accumulation", "output: error", BF16),
    Fault("range", "cross_entropy", planted.no_maximum, "ranges", "output is not finite", quick=True),
    Fault("range", "cross_entropy", planted.offset_kept, "ranges", "output: error"),
    Fault("range", "layer_norm", planted.variance_in_one_pass, "ranges", "output: error"),
    Fault("range", "rms_norm", planted.squares_in_fp16, "ranges", "output: error", FP16),
    Fault("range", "swiglu", planted.exponential_overflows, "ranges", "output is not finite"),
    Fault("range", "attention", planted.softmax_without_maximum, "ranges", "output is not finite"),
    Fault("range", "adamw", planted.update_index_of_16_bits, "ranges", "parameters: error"),
    Fault("range", "grad_norm", planted.norm_in_fp16, "ranges", "output is not finite", FP16),
    Fault("steps", "adamw", planted.remembers("learning_rate"), "steps", "parameters: error", quick=True),
    Fault("steps", "adamw", planted.remembers("update_index"), "steps", "parameters: error"),
    Fault("steps", "adamw", planted.remembers("gradient_scale"), "steps", "exp_avgs: error"),
    Fault("steps", "adamw", planted.zero_gradients_skipped, "steps", "exp_avgs: error"),
    Fault("steps", "adamw", planted.decay_ends, "steps", "parameters: error"),
    Fault("steps", "grad_norm", planted.norm_from_memory, "history", "output is not of the values that were given"),
    Fault("steps", "swiglu", planted.output_in_one_buffer, "history", "output is wrong where two calls are under way"),
    Fault("steps", "swiglu", planted.one_workspace, "history", "grad_gate is wrong where two calls are under way"),
    Fault("side effects", "swiglu", planted.changes_its_input, "untouched", "input up was changed"),
    Fault("side effects", "rope", planted.borrows_its_input, "untouched", "input q was written to"),
    Fault("side effects", "rope", planted.passes_its_input_on, "history", "k_turned lies in the memory of input k"),
    Fault(
        "side effects",
        "swiglu",
        planted.overwrites_the_incoming_gradient,
        "untouched",
        "the incoming gradient of output was changed",
        quick=True,
    ),
    Fault(
        "side effects",
        "cross_entropy",
        planted.gradient_in_what_was_saved,
        "backward_twice",
        "the second backward gives another gradient of logits",
    ),
    Fault("side effects", "swiglu", planted.saved_as_attributes, "versions", "is silently of another gate"),
    Fault("side effects", "adamw", planted.writes_through_addresses, "versions", "autograd was not told"),
    Fault("side effects", "swiglu", planted.takes_a_random_number, "untouched", "torch's random state was changed"),
    Fault("side effects", "rms_norm", planted.leaves_one_thread, "untouched", "the number of threads was changed"),
    Fault("side effects", "adamw", planted.overwrites_gradients, "untouched", "input gradients[0] was changed"),
    Fault("side effects", "add_rms_norm", planted.sum_in_the_residual, "untouched", "input residual was changed"),
    Fault("cost", "attention", reference.attention, "memory", "keeps for the backward"),
    Fault("cost", "linear_cross_entropy", reference.linear_cross_entropy, "memory", "keeps for the backward"),
    Fault("cost", "linear_cross_entropy", planted.all_logits_at_once, "memory", "takes at its peak"),
    Fault("cost", "rms_norm", planted.keeps_four_copies, "memory", "keeps for the backward"),
    Fault("cost", "swiglu", planted.leaks, "memory", "leaves behind", quick=True),
    Fault("cost", "grad_norm", planted.all_gradients_joined, "memory", "takes at its peak"),
    Fault("cost", "swiglu", planted.waits, "time", "the reference's"),
    Fault("cost", "grad_norm", planted.hangs, "sizes", "took longer than 0.5 s", limit_s=0.5, quick=True),
    Fault(
        "derivatives",
        "cross_entropy",
        planted.gradients_are_constants,
        "second_derivatives",
        "the gradient of a penalty on the gradients is off by",
        quick=True,
    ),
    Fault(
        "derivatives",
        "swiglu",
        planted.refuses_without_its_name,
        "second_derivatives",
        "refused without the names of op and source",
    ),
    Fault(
        "derivatives",
        "swiglu",
        planted.incoming_gradient_is_a_constant,
        "second_derivatives",
        "off by 100% in the incoming gradient of output",
    ),
    Fault("derivatives", "rms_norm", planted.weight_is_a_constant, "second_derivatives", "in weight"),
    Fault("derivatives", "swiglu", planted.once_differentiable, "second_derivatives", ""),
    Fault("threads", "swiglu", planted.rest_of_three_lost, "threads", "on 2 threads output: error", quick=True),
    Fault("threads", "grad_norm", planted.partial_sum_lost, "threads", "on 3 threads output: error"),
    Fault("threads", "rms_norm", planted.races, "threads", "threads output: error"),
]


def _asked(fault: Fault, function: Callable[..., Any]) -> CheckReport:
    threads = torch.get_num_threads()
    item = Implementation(fault.op, "planted", function, thresholds=fault.thresholds)
    try:
        return run_checks(
            dtypes=[fault.dtype],
            checks=[fault.check],
            implementations=[item],
            examples=[OPS[fault.op].smallest] if fault.check == "numerics" else None,
            thorough=fault.check == "time",
            limit_s=fault.limit_s,
        )
    finally:
        torch.set_num_threads(threads)


def _caught(fault: Fault) -> bool:
    return any(fault.words in finding.detail for finding in _asked(fault, fault.function).failed)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.quick], ids=lambda fault: fault.name)
def test_a_fault_of_each_kind_is_caught_by_its_check(fault: Fault) -> None:
    assert _caught(fault), list(_asked(fault, fault.function))


@pytest.mark.prove
def test_the_score() -> None:
    """At least 95 % of the faults, by the check that their kind is for: printed, with what got away."""
    missed = [fault.name for fault in FAULTS if not _caught(fault)]
    kinds = {fault.kind: [one for one in FAULTS if one.kind == fault.kind] for fault in FAULTS}
    for kind, faults in kinds.items():
        print(f"{kind}: {sum(fault.name not in missed for fault in faults)} of {len(faults)}")
    assert len(FAULTS) >= 40
    assert all(len(faults) >= 3 for faults in kinds.values())
    assert len(FAULTS) - len(missed) >= LEAST_CAUGHT * len(FAULTS), missed
