"""Options that contradict each other are refused."""

from __future__ import annotations

import pytest

from weftrain.backends.cuda.options import CudaOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"parallel": "ddp", "tensor_parallel": 2},
        {"parallel": "ddp", "cpu_offload": True},
        {"cuda_graphs": True, "compile": True},
        {"shard_group": 2},
    ],
)
def test_options_that_contradict_each_other(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs parallel|is of parallel|needs compile"):
        CudaOptions.model_validate(wrong)
