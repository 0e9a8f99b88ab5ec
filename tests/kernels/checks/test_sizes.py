"""Thresholds and sizes: what is asked of whom. test_planted_faults.py beside this shows that faults are caught."""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels import OPS, Implementation, KernelError, load_catalog, reference
from weftrain.kernels.checks import CHECKS, run_checks
from weftrain.kernels.checks.findings import Subject


def test_a_threshold_is_crossed_by_one_and_a_size_that_the_op_lacks_is_refused() -> None:
    item = Implementation("swiglu", "ours", reference.swiglu, thresholds={"rows": 40})
    (finding,) = run_checks(dtypes=[torch.float32], checks=["thresholds"], implementations=[item])
    assert (finding.example, finding.ok) == ("rows 41", True)
    item = Implementation("swiglu", "ours", reference.swiglu, thresholds={"tokens": 40})
    with pytest.raises(KernelError, match="thresholds names the size 'tokens'; the op has: rows, intermediate_size"):
        run_checks(checks=["thresholds"], implementations=[item])


def test_every_declared_threshold_is_of_a_size_of_the_op() -> None:
    items = [item for by in load_catalog().values() for variants in by.values() for item in variants]
    declared = [item for item in items if item.thresholds]
    assert {"attention", "linear_cross_entropy", "adamw", "grad_norm"} <= {item.op for item in declared}
    assert all(set(item.thresholds) <= set(OPS[item.op].sizes) for item in declared)


def test_the_thorough_run_asks_for_more_sizes_in_every_dtype() -> None:
    subject = Subject(Implementation("swiglu", "ours", reference.swiglu), "cpu", (torch.float32, torch.bfloat16))
    quick, thorough = (CHECKS["sizes"].asked(subject, how) for how in (False, True))
    assert [case.example for case in quick] == ["rows 8000", "intermediate_size 25000"]
    assert [(case.example, case.dtype) for case in thorough][-2:] == [
        ("intermediate_size 1000001", torch.float32),
        ("intermediate_size 1000001", torch.bfloat16),
    ]
    assert not CHECKS["time"].asked(subject, False)
    assert CHECKS["time"].asked(subject, True)
