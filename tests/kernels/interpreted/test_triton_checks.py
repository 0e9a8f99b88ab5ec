"""Every Triton op answers every question of `weftrain kernels check`, interpreted, in fp32, bf16 and fp16."""

from __future__ import annotations

import pytest

from weftrain.kernels import load_catalog

pytestmark = pytest.mark.prove  # minutes: make prove


@pytest.mark.parametrize("op", [op for op, by_source in load_catalog().items() if "triton" in by_source])
def test_every_triton_op_passes_every_check(op: str) -> None:
    from weftrain.kernels.checks import run_checks

    report = run_checks([op], ["triton"])
    assert report
    assert not report.failed, "\n".join(f"{f.check} {f.example} {f.dtype}: {f.detail}" for f in report.failed)
