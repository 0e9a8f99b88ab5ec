"""adamw and grad_norm: the reference bit for bit against torch's own optimizer and clip, large norms, and what is
compiled when.

Errors against float64, copies, epsilon's placement and bad calls are checked for every source by checks/test_engine.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from weftrain.kernels import OPS, Implementation, Spec, load_catalog

CATALOG = load_catalog()
SIZES = ((33, 17), (1,), (9000,), (4, 4096))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)


def usable(op: str, dtype: torch.dtype) -> list[Implementation]:
    spec = Spec(op, "optimizer", "cpu", dtype, OPS[op].attributes)
    return [variant for variants in CATALOG[op].values() for variant in variants if variant.unavailable(spec) is None]


def test_reference_adamw_is_torch_adamw_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(size, generator=generator) for size in SIZES]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours]
    state = [[torch.zeros_like(tensor) for tensor in ours] for _ in range(2)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for t in range(1, 6):
        gradients = [torch.randn(size, generator=generator) for size in SIZES]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
        optimizer.step()
        assert torch.equal(OPS["grad_norm"].function(gradients), norm)
        scale = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        OPS["adamw"].function(
            ours, gradients, *state, None, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            update_index=t, eps_placement="after_bias_correction", gradient_scale=scale,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_new_rate_or_step_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve updates of four shapes with changing scalars: one graph (and one more tensor that is too small for
    one).
    """
    from torch._dynamo.utils import counters

    from weftrain.kernels.torch_ops.adamw import adamw
    from weftrain.kernels.torch_ops.grad_norm import grad_norm

    counters.clear()
    arguments = OPS["adamw"].examples["odd"]("cpu", torch.bfloat16)
    for t in range(1, 13):
        adamw(**{**arguments, "update_index": t, "learning_rate": 1e-3 / t, "gradient_scale": torch.tensor(1 / t)})
    assert counters["stats"]["unique_graphs"] == 1
    for rows in (1, 2, 3, 5, 9):
        grad_norm([torch.ones(rows * 4096), torch.ones(rows * 4096 + 7)])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_norm_against_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 4095, 4096, 8192, 8193, 1_000_003):
        gradients = [torch.randn(size, generator=generator).to(dtype), torch.randn(3, 5, generator=generator).to(dtype)]
        exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
        for implementation in usable("grad_norm", dtype):
            norm = implementation.function(gradients)
            assert norm.dtype == torch.float32
            assert norm.shape == ()
            assert abs(float(norm) / float(exact) - 1) < 1e-4, (implementation.source, size)


def test_grad_norm_shows_what_is_not_finite() -> None:
    for implementation in usable("grad_norm", torch.bfloat16):
        for bad in (float("nan"), float("inf")):
            for size, place in ((10, 3), (20_000, 12_345), (20_000, 19_999)):
                gradient = torch.ones(size, dtype=torch.bfloat16)
                gradient[place] = bad
                assert not torch.isfinite(implementation.function([torch.ones(7, dtype=torch.bfloat16), gradient]))
