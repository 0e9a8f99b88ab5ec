"""Triton attention, interpreted: what the generic checks do not ask. Tiles that are skipped, what is saved, views, and
launches' constants.

Every tile that is visited multiplies its hidden values by zero, and NaN times zero is NaN: so NaN in what must be
skipped shows a visit.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weftrain.kernels import OPS, reference
from weftrain.kernels.contract import TARGETS

NAN = float("nan")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def module() -> Any:
    """Imported when a test runs, so that a process that does not interpret can collect this file."""
    return importlib.import_module("weftrain.kernels.triton_ops.attention")


def tables() -> Any:
    return importlib.import_module("weftrain.kernels.triton_ops._attention_tables")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def example(
    T: int,
    D: int,
    start: Tensor | None = None,
    B: int = 2,
    H: int = 1,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    heads = (H, *(kv_heads or H,) * 2)
    q, k, v = (normal(B, T, count, D, seed=seed, dtype=dtype) for seed, count in enumerate(heads))
    return {"q": q, "k": k, "v": v, "scale": D**-0.5, "document_start": start, "window": window}


def results(function: Callable[..., Tensor], arguments: dict[str, Any], incoming: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of q, k and v; arguments keep their strides."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("q", "k", "v")}
    output = function(**{**arguments, **leaves})
    incoming = normal(*output.shape, seed=9).to(output.dtype) if incoming is None else incoming
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), incoming)]


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-6))


def documents(kind: str, T: int, B: int = 2) -> Tensor:
    """int32 [B, T] of several kinds; all are within the contract, which does not ask that starts ascend."""
    t = torch.arange(T)
    start = {
        "none": torch.zeros(T, dtype=torch.int64),
        "one_token_each": t,
        "window_of_7": (t - 6).clamp(min=0),
        "cut_at_37_and_96": torch.where(t >= 96, 96, torch.where(t >= 37, 37, 0)),
        "cut_at_tiles": t // 64 * 64,
        "cut_one_after_tiles": torch.where(t >= 129, 129, torch.where(t >= 65, 65, torch.where(t >= 33, 33, 0))),
        "in_no_order": (torch.rand(T, generator=torch.Generator().manual_seed(4)) * (t + 1)).long(),
    }[kind]
    return torch.stack([start if row == 0 else start.div(row + 1, rounding_mode="floor") for row in range(B)]).to(
        torch.int32
    )


@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 16), (31, 3), (64, 64), (129, 40)])
def test_ugly_lengths_and_heads(T: int, D: int) -> None:
    """The cap of the checks, 1e-6, and not less: of two keys one with nearly all the weight, the gradient of q is what
    little is left.
    """
    arguments = example(T, D, B=1, H=2)
    exact = results(OPS["attention"].exact, wide(arguments))
    for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
        assert relative_error(got, truth) < 1e-6, name


KINDS = (
    "none",
    "one_token_each",
    "window_of_7",
    "cut_at_37_and_96",
    "cut_at_tiles",
    "cut_one_after_tiles",
    "in_no_order",
)


@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind: str) -> None:
    """141 tokens: more than two tiles either way, and the last is cut."""
    arguments = example(141, 20, documents(kind, 141))
    exact = results(OPS["attention"].exact, wide(arguments))
    for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
        assert relative_error(got, truth) < 5e-7, name


@pytest.mark.parametrize(
    ("H", "kv_heads", "window"),
    [(3, 1, None), (3, 1, 7), (4, 2, 31), (4, 2, 32), (3, 3, 33), (6, 3, 64), (2, 2, 1), (2, 1, 200)],
)
def test_key_heads_and_windows(H: int, kv_heads: int, window: int | None) -> None:
    """Tiles have 32 keys and queries: windows below, at and above, and longer than the row; documents with two of
    them.
    """
    start = documents("cut_at_37_and_96", 101, B=1) if window in (7, 32) else None
    arguments = example(101, 20, start, B=1, H=H, kv_heads=kv_heads, window=window)
    exact = results(OPS["attention"].exact, wide(arguments))
    for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
        if truth.any():
            assert relative_error(got, truth) < 5e-7, name
        else:
            assert not got.any(), name  # of one key neither q nor k is moved


@pytest.mark.parametrize("kind", ["cut_at_37_and_96", pytest.param("cut_one_after_tiles", marks=pytest.mark.soak)])
def test_every_tile_that_a_launch_takes_anywhere(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in a tile differ between targets, dtypes and heads; here all of them at one small head, in
    fp32.
    """
    more = {"H": 2, "kv_heads": 1, "window": 50} if kind == "cut_at_37_and_96" else {}
    arguments = example(141, 8, documents(kind, 141, B=1), B=1, **more)
    exact = results(OPS["attention"].exact, wide(arguments))
    made = (line for lines in tables().CONFIGURATIONS.values() for line in lines.values())
    for shape in sorted({(line.block_m, line.block_n) for line in made}):
        monkeypatch.setattr(module(), "configuration", lambda *_, shape=shape: module().Configuration(*shape, 4, 1))
        for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
            assert relative_error(got, truth) < 5e-7, (shape, name)


def in_one_kernel(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int) -> None:
    """The backward of fp32 too, in tiles of that many queries and keys; an interpreted launch takes two kernels."""
    taken = module().Configuration(block_m, block_n, 4, 1)
    monkeypatch.setattr(module(), "one_kernel_backward", lambda *_: taken)
    monkeypatch.setattr(module().kernels, "backward_queries", None)


@pytest.mark.parametrize(
    ("block_m", "block_n", "T", "kv_heads", "window", "kind"),
    [
        (64, 128, 269, 2, None, None),
        (32, 64, 141, 1, 50, "cut_at_37_and_96"),
        (32, 128, 141, 2, None, "in_no_order"),
        (32, 16, 101, 1, 33, "one_token_each"),  # no launch has more queries than keys, but nothing forbids it
    ],
)
def test_the_backward_in_one_kernel(
    block_m: int,
    block_n: int,
    T: int,
    kv_heads: int,
    window: int | None,
    kind: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of keys add to dq in turn, and what is added out of turn is NaN here; the bits do not depend on the run."""
    start = None if kind is None else documents(kind, T, B=1)
    arguments = example(T, 20, start, B=1, H=2, kv_heads=kv_heads, window=window)
    in_one_kernel(monkeypatch, block_m, block_n)
    got = results(module().attention, arguments)
    for name, one, truth in zip("oqkv", got, results(OPS["attention"].exact, wide(arguments)), strict=True):
        if truth.any():
            assert relative_error(one, truth) < 5e-7, name
        else:
            assert not one.any(), name


@pytest.mark.parametrize("T", [97, 128])
def test_nobody_waits_for_a_turn_that_no_one_takes(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever document_start holds, on a GPU nobody looks at it: the turns of every tile of queries are without a gap,
    else a launch would hang.
    """
    in_one_kernel(monkeypatch, 16, 16)
    original, turns = module().kernels.backward_keys, []

    def launch(grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            turns.append(dict(zip(original.arg_names, args, strict=False))["turn"])
            original[grid](*args, **kwargs)

        return run

    monkeypatch.setattr(
        module().kernels, "backward_keys", type("", (), {"__getitem__": lambda _, grid: launch(grid)})()
    )
    generator = torch.Generator().manual_seed(7)
    q, dout, out = (normal(1, T, 1, 16, seed=seed) for seed in range(3))
    lse = torch.zeros(1, 1, T)
    for _ in range(2):
        start = torch.randint(-20, T + 20, (1, T), generator=generator, dtype=torch.int32)
        dq, *_ = module()._BACKWARD(dout, q, q, q, out, lse, start, 0.25, T)
        assert dq.isfinite().all()
        assert (turns.pop() > 0).all()


@pytest.mark.parametrize("window", [None, 90])
def test_documents_longer_than_one_scan(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key tile looks for its last query SCAN starts at a time; here in the third look, and the last key tile has none
    after it.
    """
    monkeypatch.setattr(module().kernels, "SCAN", 64)
    if window is not None:
        in_one_kernel(monkeypatch, 64, 64)
    t = torch.arange(260)
    start = torch.where(t >= 250, 250, torch.where(t >= 70, 70, 0)).to(torch.int32)[None]
    arguments = example(260, 16, start, B=1, H=1, window=window)
    exact = results(reference.attention, wide(arguments))
    for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
        assert relative_error(got, truth) < 5e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_forward_saves(dtype: torch.dtype) -> None:
    """lse: log2 of the sum over visible keys of exp(score), [B, H, T], from float64."""
    start = documents("cut_at_37_and_96", 141)
    arguments = example(141, 24, start, dtype=dtype)
    out, lse = module()._FORWARD(arguments["q"], arguments["k"], arguments["v"], start, arguments["scale"])
    q, k = arguments["q"].double(), arguments["k"].double()
    t = torch.arange(141)
    hidden = (t > t[:, None]) | (t < start[:, None, :, None])
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * arguments["scale"]).masked_fill(hidden, -math.inf)
    assert lse.dtype == torch.float32
    assert float((lse - scores.logsumexp(-1) / math.log(2)).abs().max()) < 2e-6  # 2^-24 of scores about 10, twice
    bound = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative_error(out, OPS["attention"].exact(**wide(arguments))) < bound


def test_a_query_with_one_key_moves_neither_it_nor_the_key() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = example(70, 24, documents("one_token_each", 70, B=1), B=1, H=2, dtype=dtype)
        out, dq, dk, dv = results(module().attention, arguments, torch.ones(1, 70, 2, 24, dtype=dtype))
        assert torch.equal(out, arguments["v"])
        assert not dq.any()
        assert not dk.any()
        torch.testing.assert_close(dv, torch.ones_like(dv), rtol=0, atol=1e-6)


def test_the_future_and_other_documents_are_invisible() -> None:
    """Bit for bit: huge values anywhere out of sight; NaN in any hidden key, and in values of tiles that no row of the
    tile sees.
    """
    T, attention = 141, module().attention
    start = documents("cut_at_37_and_96", T, B=1)
    arguments = example(T, 20, start, B=1)
    before = attention(**arguments)
    position = torch.arange(T)
    for t in (0, 36, 37, 96):
        hidden = (position > t) | (position < start[0, t])
        for changes in ({"k": 1e4, "v": 1e4}, {"k": NAN}):
            changed = {name: arguments[name].clone() for name in changes}
            for name, value in changes.items():
                changed[name][:, hidden] = value
            assert torch.equal(attention(**{**arguments, **changed})[:, t], before[:, t]), (t, changes)


def test_tiles_out_of_sight_are_not_visited() -> None:
    """Three documents of 128: NaN in the first and the last reaches nothing of the second, forward or backward."""
    T, attention = 384, module().attention
    start = (torch.arange(T) // 128 * 128).to(torch.int32)[None]
    arguments = example(T, 16, start, B=1, H=1)
    incoming = normal(1, T, 1, 16, seed=9)
    clean = results(attention, arguments, incoming)
    poisoned = {name: arguments[name].clone() for name in ("q", "k", "v")}
    for tensor in (*poisoned.values(), incoming):
        tensor[:, :128] = NAN
        tensor[:, 256:] = NAN
    for name, got, expected in zip("oqkv", results(attention, {**arguments, **poisoned}, incoming), clean, strict=True):
        assert torch.equal(got[:, 128:256], expected[:, 128:256]), name
        assert not got[:, :128].isfinite().any(), name


def test_tiles_before_a_window_are_not_visited() -> None:
    """NaN in the first tiles reaches no query whose window begins after them, nor a key that none of them sees."""
    T, attention = 160, module().attention
    arguments = example(T, 16, B=1, H=2, kv_heads=1, window=30)
    incoming = normal(1, T, 2, 16, seed=9)
    clean = results(attention, arguments, incoming)
    poisoned = {name: arguments[name].clone() for name in ("q", "k", "v")}
    for tensor in (*poisoned.values(), incoming):
        tensor[:, :64] = NAN
    for name, got, expected in zip("oqkv", results(attention, {**arguments, **poisoned}, incoming), clean, strict=True):
        assert torch.equal(got[:, 96:], expected[:, 96:]), name
        assert not got[:, :64].isfinite().any(), name


def test_without_documents_the_future_is_not_visited() -> None:
    attention = module().attention
    arguments = example(256, 16, B=1, H=1)
    incoming = normal(1, 256, 1, 16, seed=9)
    incoming[:, 128:] = 0
    clean = results(attention, arguments, incoming)
    poisoned = {name: arguments[name].clone() for name in ("k", "v")}
    for tensor in poisoned.values():
        tensor[:, 128:] = NAN
    out, dq, *_ = results(attention, {**arguments, **poisoned}, incoming)
    assert torch.equal(out[:, :128], clean[0][:, :128])
    assert torch.equal(dq[:, :128], clean[1][:, :128])


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_any_scale(scale: float) -> None:
    arguments = {**example(65, 8), "scale": scale}
    exact = results(OPS["attention"].exact, wide(arguments))
    for name, got, truth in zip("oqkv", results(module().attention, arguments), exact, strict=True):
        if truth.any():
            assert relative_error(got, truth) < 1e-6, name
        else:
            assert not got.any(), name


@pytest.mark.parametrize(
    ("T", "H", "kv_heads", "kind", "window"), [(141, 2, 1, "cut_at_37_and_96", 50), (97, 2, 2, None, None)]
)
def test_tiles_by_descriptors_are_those_by_pointers(
    T: int, H: int, kv_heads: int, kind: str | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, of contiguous tensors and of views of one product, with NaN behind the last row of each batch; where
    a descriptor cannot be made, there is none.
    """
    usual = module().configuration("forward", TARGETS[0], 2, 64)
    monkeypatch.setattr(module(), "DESCRIBED_FORWARD", {64: {TARGETS[0]: usual}})
    made: list[list[int]] = []
    descriptor = module().TensorDescriptor
    monkeypatch.setattr(module(), "TensorDescriptor", lambda *how: made.append(how[3]) or descriptor(*how))
    start = None if kind is None else documents(kind, T)
    room = normal(2, T + 9, H + 2 * kv_heads, 64, dtype=torch.float16)
    room[:, T:] = NAN
    q, k, v = room[:, :T].split([H, kv_heads, kv_heads], 2)
    apart = [torch.stack((x, x), 3).flatten(2, 3)[:, :, ::2] for x in (q, k, v)]  # heads with others between
    outputs = [
        module().attention(*inputs, scale=0.2, document_start=start, window=window)
        for inputs in ((q, k, v), [x.contiguous() for x in (q, k, v)], apart)
    ]
    assert len(made) == 6 if H > 1 and kv_heads > 1 else len(made) in (6, 8)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert outputs[0].isfinite().all()


def test_what_a_descriptor_can_describe() -> None:
    x = torch.empty(2, 5, 3, 64, dtype=torch.bfloat16)
    describable = module()._describable
    assert describable(x)
    assert describable(torch.empty(2, 5, 9, 64, dtype=torch.bfloat16)[:, :, 3:6])
    odd = torch.empty(2 * 5 * 193, dtype=torch.bfloat16)
    for other in (
        x.float(),
        x[..., :32],  # heads of 32 with 32 between
        x.transpose(1, 2).contiguous().transpose(1, 2),  # heads apart
        x[:1].expand(2, 5, 3, 64),  # a stride of 0
        odd.as_strided((2, 5, 3, 64), (5 * 193, 193, 64, 1)),  # rows of no multiple of 16 bytes
        odd[1:].as_strided((1, 5, 3, 64), (960, 192, 64, 1)),  # a base of no multiple of 16 bytes
    ):
        assert not describable(other)


class Operators(TorchDispatchMode):
    """The arguments of every operator that ran, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def test_views_are_taken_as_they_are() -> None:
    """q, k, v of one product, and an incoming gradient that was transposed: no copy, and the bits of contiguous
    ones.
    """
    packed = normal(2, 65, 3, 2, 16)
    q, k, v = packed.unbind(2)
    incoming = normal(2, 2, 65, 16, seed=9).transpose(1, 2)
    arguments = {"q": q, "k": k, "v": v, "scale": 0.25, "document_start": None, "window": None}
    with Operators() as ran:
        got = results(module().attention, arguments, incoming)
    calls = dict(ran.calls)
    assert [x.data_ptr() for x in calls["weftrain::attention_forward"][:3]] == [x.data_ptr() for x in (q, k, v)]
    assert [x.data_ptr() for x in calls["weftrain::attention_backward"][:4]] == [
        x.data_ptr() for x in (incoming, q, k, v)
    ]
    dense = {**arguments, **{name: arguments[name].contiguous() for name in ("q", "k", "v")}}
    expected = results(module().attention, dense, incoming.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(x.is_contiguous() for x in got)


def test_other_strides_are_copied() -> None:
    """A last stride of 2, an expanded gradient (stride 0), rows so far apart that 32-bit offsets within a tile would
    not reach.
    """
    arguments = example(33, 8, H=2)
    expected = results(module().attention, arguments, torch.ones(()).expand(2, 33, 2, 8))
    strided = {name: torch.stack((arguments[name],) * 2, -1)[..., 0] for name in ("q", "k", "v")}
    got = results(module().attention, {**arguments, **strided}, torch.ones(2, 33, 2, 8))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    far = torch.empty_strided((1, 2, 1, 8), (8, 2**23, 8, 1), device="meta")
    assert module()._readable(far).stride() == (16, 8, 8, 1)


@pytest.mark.parametrize("shape", [(2, 0, 2, 8), (0, 5, 2, 8), (2, 5, 0, 8), (2, 5, 2, 0)])
def test_nothing_is_launched_for_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward", "row_sums", "backward_keys", "backward_queries"):
        monkeypatch.setattr(module().kernels, name, None)
    empty = {name: torch.empty(shape) for name in ("q", "k", "v")}
    for start in (None, torch.zeros(shape[:2], dtype=torch.int32)):
        arguments = {**empty, "scale": 1.0, "document_start": start, "window": None}
        for got in results(module().attention, arguments, torch.empty(shape)):
            assert got.shape == shape


def test_the_same_bits_again() -> None:
    arguments = OPS["attention"].examples["odd_documents"]("cpu", torch.float32)
    first = results(module().attention, arguments)
    assert all(torch.equal(a, b) for a, b in zip(results(module().attention, arguments), first, strict=True))


def test_a_document_start_that_nobody_looked_at_reads_nothing_outside() -> None:
    """On a GPU nobody looks: behind the check, a negative start is the first key, and a row that starts after itself is
    NaN, no other.
    """
    q, k, v = (normal(1, 70, 1, 8, seed=seed) for seed in range(3))
    guarded = [torch.full((1, 70 + 2 * 160, 1, 8), NAN) for _ in range(3)]
    for room, x in zip(guarded, (q, k, v), strict=True):
        room[:, 160:230] = x
    inside = [room[:, 160:230] for room in guarded]
    start = torch.zeros(1, 70, dtype=torch.int32)
    expected, _ = module()._FORWARD(q, k, v, start, 0.5)
    start[0, 5], start[0, 69] = -100, 70
    out, _ = module()._FORWARD(*inside, start, 0.5)
    assert torch.equal(out[:, :69], expected[:, :69])
    assert out[:, 69].isnan().all()


class Recorder:
    """Stands where a kernel stands, and keeps what a launch passes."""

    def __init__(self, kernel: Any) -> None:
        self.names, self.calls = kernel.arg_names, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append({**dict(zip(self.names, args, strict=False)), **kwargs})


def types_of(call: dict[str, Any], dtype: str) -> dict[str, str]:
    """Of the tensors of a launch, as signatures spell them."""
    return {
        name: f"*{dtype}:16" if isinstance(call[name], Tensor) else f"tensordesc<{dtype}{call[name].block_shape}>"
        for name in ("q", "k", "dout")
        if name in call
    }


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("with_documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("kv_heads", [2, 1], ids=["multi_head", "grouped"])
def test_a_launch_takes_what_the_compile_gate_compiled(
    head_dim: int, with_documents: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each target and dtype, the constants of each launch are those of a default compilation that is for that
    target.
    """
    attention, kernels = module(), module().kernels
    names = ("forward", "row_sums", "backward_keys", "backward_queries")
    originals = {name: getattr(kernels, name) for name in names}
    compilations = attention._compilations()
    start = torch.zeros(1, 3, dtype=torch.int32) if with_documents else None
    for on in TARGETS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            monkeypatch.setattr(attention, "target", lambda device, on=on: on)
            recorders = {name: Recorder(kernel) for name, kernel in originals.items()}
            for name, recorder in recorders.items():
                monkeypatch.setattr(kernels, name, recorder)
            results(attention.attention, example(3, head_dim, start, B=1, H=2, dtype=dtype, kv_heads=kv_heads))
            one = attention.one_kernel_backward(on, dtype.itemsize, head_dim, kv_heads < 2)
            assert len(recorders["backward_queries"].calls) == (one is None)
            for name, recorder in recorders.items():
                if name == "backward_queries" and one is not None:
                    continue
                (call,) = recorder.calls
                call |= {"INTERPRETED": False} if "INTERPRETED" in call else {}
                matching = [
                    compilation
                    for compilation in compilations
                    if compilation.kernel is originals[name] and compilation.default and on in compilation.targets
                    and all(call[key] == value for key, value in compilation.constexprs.items())
                    and (call["num_warps"], call.get("num_stages", 3)) == (compilation.num_warps, compilation.num_stages)
                    and types_of(call, DTYPES[dtype]) == {x: compilation.signature[x] for x in ("q", "k", "dout") if x in call}
                ]  # fmt: skip
                assert len(matching) == 1, (on, dtype, name, [c.name for c in matching])
                assert set(call) - {"num_warps", "num_stages"} == {*matching[0].signature, *matching[0].constexprs}
