"""What an Op must state, and which of its examples the checks take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weftrain.kernels import OPS, KernelError


def test_an_op_with_gradients_states_the_cost_of_its_backward() -> None:
    with pytest.raises(KernelError, match="op swiglu: has gradients and no backward_cost"):
        replace(OPS["swiglu"], backward_cost=None)
    assert not OPS["adamw"].differentiable
    assert OPS["adamw"].backward_cost is None


def test_small_examples_are_known_by_their_names() -> None:
    examples = dict.fromkeys(("odd", "edge_above", "bench_70m", "amber_7b"), OPS["swiglu"].examples["odd"])
    op = replace(OPS["swiglu"], examples=examples)
    assert (op.small, op.smallest) == (("odd", "edge_above"), "odd")
    assert replace(op, examples={**examples, "odd_small": examples["odd"]}).smallest == "odd_small"
