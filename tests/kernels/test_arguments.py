"""The checks of arguments: their words, and when values are looked at. That every implementation refuses what the
reference refuses is the check `refused` of kernels/checks, run by checks/test_engine.py.
"""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels import OPS, KernelError
from weftrain.kernels.arguments import check_cross_entropy


@pytest.mark.parametrize("name", OPS)
def test_a_refusal_is_one_line_that_begins_with_the_op(name: str) -> None:
    op = OPS[name]
    for change in (*op.wrong.values(), *op.wrong_values.values()):
        arguments = change(op.examples[op.smallest]("cpu", torch.float32))
        with pytest.raises(KernelError, match=rf"^{name}: [^\n]+$"):
            op.function(**arguments)


def test_values_are_looked_at_only_where_that_waits_for_nothing() -> None:
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(KernelError, match=r"labels\[1\] is 3; it must be in 0..2, or -100 to be ignored"):
        check_cross_entropy(logits, labels, -100)
    check_cross_entropy(logits, labels, 3)
    check_cross_entropy(logits.to("meta"), labels.to("meta"), -100)
