"""The Triton ops but attention, interpreted: what the generic checks do not ask of an implementation.

Labels that name no column, rows that are ignored, views taken as they are, sums whose order is fixed, launches that
must not happen. Long, for one file of helpers serves all of these ops.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weftrain.kernels import OPS, KernelError
from weftrain.kernels.adamw_scalars import adamw_scalars
from weftrain.kernels.arguments import EPS_PLACEMENTS
from weftrain.kernels.gradients_in_forward import differentiable_loss

NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
DIFFERENTIABLE = (*NORMS, "rope", "swiglu", "grouped_gemm", "cross_entropy", "linear_cross_entropy")
NAN, INF = float("nan"), float("inf")


def module(op: str) -> Any:
    """The op's file; imported when a test runs, so that a process that does not interpret can collect this one."""
    return importlib.import_module(f"weftrain.kernels.triton_ops.{op}")


def triton_op(op: str) -> Callable[..., Any]:
    return module(op).IMPLEMENTATION.function


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(
    function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...], *incoming: Tensor
) -> list[Tensor]:
    """The outputs, and the gradient of each named argument; arguments keep their strides. incoming: None is ones."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = outputs_of(function(**{**arguments, **leaves}))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming or tuple(map(torch.ones_like, outputs)))
    return [*(output.detach() for output in outputs), *gradients]


def outputs_of(returned: Any) -> tuple[Tensor, ...]:
    return (returned,) if isinstance(returned, Tensor) else returned


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


class Operators(TorchDispatchMode):
    """Every call of one of our operators, with its arguments, and every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "weftrain":
            self.calls.setdefault(func.__name__.split(".")[0], []).append(args)
        return func(*args, **(kwargs or {}))


# ---- labels
# ----------------------------------------------------------------------------------------------------

BAD_LABELS = (-1, 101, 10**12, -(2**63))


def test_a_label_outside_the_vocabulary_gives_nan_in_a_compiled_graph() -> None:
    """There values are not looked at beforehand. A label of 10^12 would be an address far outside of anything that is
    mapped.
    """
    arguments = OPS["cross_entropy"].examples["odd_scaled"]("cpu", torch.float32)
    good_loss, good_grad = results(triton_op("cross_entropy"), arguments, ("logits",))
    rows = torch.tensor([1, 5, 9, 13])
    bad = {**arguments, "labels": arguments["labels"].index_copy(0, rows, torch.tensor(BAD_LABELS))}
    with pytest.raises(ValueError, match=r"labels\[1\] is -1"):  # and eagerly, on a CPU, they are refused
        triton_op("cross_entropy")(**bad)
    torch._dynamo.reset()
    loss, grad = results(
        torch.compile(triton_op("cross_entropy"), fullgraph=True, backend="aot_eager"), bad, ("logits",)
    )
    others = torch.ones(29, dtype=torch.bool).index_fill(0, rows, False)
    assert loss[rows].isnan().all()
    assert (grad[rows] == 0).all()
    assert torch.equal(loss[others], good_loss[others])
    assert torch.equal(grad[others], good_grad[others])


def test_a_label_outside_the_vocabulary_makes_the_summed_loss_nan() -> None:
    arguments = OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float32)
    compiled = torch.compile(triton_op("linear_cross_entropy"), fullgraph=True, backend="aot_eager")
    for label in BAD_LABELS:
        torch._dynamo.reset()
        labels = arguments["labels"].clone()
        labels[3] = label
        assert compiled(**{**arguments, "labels": labels}).isnan()


@pytest.mark.parametrize("ignore_index", [-100, 7, 2**40], ids=["negative", "a_column", "beyond_int32"])
def test_ignored_rows_give_zero_and_move_nothing(ignore_index: int) -> None:
    logits = normal(6, 33)
    labels = torch.tensor([3, ignore_index, 0, ignore_index, 32, 8])
    ignored = labels == ignore_index
    arguments = {"logits": logits, "labels": labels, "ignore_index": ignore_index, "z_loss": 1e-2}
    incoming = torch.where(ignored, NAN, 1.0)  # what arrives for an ignored row is not looked at
    loss, grad = results(triton_op("cross_entropy"), arguments, ("logits",), incoming)
    assert (loss[ignored] == 0).all()
    assert (grad[ignored] == 0).all()
    kept = {**arguments, "logits": logits[~ignored], "labels": labels[~ignored]}
    assert all(
        torch.equal(a[~ignored], b)
        for a, b in zip((loss, grad), results(triton_op("cross_entropy"), kept, ("logits",)), strict=True)
    )


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_in_an_ignored_row_shows_as_in_the_reference(bad: float) -> None:
    logits = normal(4, 33)
    logits[1, 5] = bad
    arguments = {"logits": logits, "labels": torch.tensor([3, -100, 0, 32])}
    got = results(triton_op("cross_entropy"), arguments, ("logits",))
    expected = results(OPS["cross_entropy"].function, arguments, ("logits",))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert got[0].isfinite().all()
    assert got[1][1].isnan().all()


# ---- rows longer than a block
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("vocab", [1, 2, 4095, 4097, 3 * 4096 + 5])
def test_vocabularies_around_the_block_size(op: str, vocab: int) -> None:
    """The last column holds a label, and the largest logit is in the first, a middle and the last block."""
    logits = normal(4, vocab)
    for row, column in enumerate((0, vocab // 2, vocab - 1)):
        logits[row, column] += 9
    arguments: dict[str, Any] = {
        "labels": torch.tensor([vocab - 1, 0, vocab // 2, vocab - 1]),
        "logits_scale": 0.7,
        "z_loss": 1e-3,
    }
    if op == "cross_entropy":
        arguments["logits"] = logits
    else:  # hidden picks one row of the transposed weight, exactly
        arguments.update(hidden=torch.eye(4), weight=logits.t().contiguous())
    names = OPS[op].differentiable
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    exact_logits = wide["logits"] if op == "cross_entropy" else wide["hidden"] @ wide["weight"].t()
    scaled = exact_logits * 0.7
    exact = (
        scaled.logsumexp(-1)
        - scaled.gather(1, arguments["labels"][:, None]).squeeze(1)
        + 1e-3 * scaled.logsumexp(-1).square()
    )
    softmax = scaled.softmax(-1) * (1 + 2e-3 * scaled.logsumexp(-1, keepdim=True))
    slope = (softmax - torch.nn.functional.one_hot(arguments["labels"], vocab)) * 0.7
    got = results(triton_op(op), arguments, names)
    expected = [exact, slope] if op == "cross_entropy" else [exact.sum(), slope @ wide["weight"], slope.t()]
    for name, a, b in zip(("output", *names), got, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-6))  # of one column only the z-loss is left
        assert error < (1e-6 if op == "cross_entropy" else 3e-6), (name, error)  # a product sums 12,293 terms in fp32


def test_a_block_of_minus_infinity_is_not_nan() -> None:
    """Masked logits: a first block without any finite one, and one in the middle."""
    logits = normal(3, 4 * 4096)
    logits[0, :4096] = -INF
    logits[1, 4096:8192] = -INF
    logits[2, 1:] = -INF
    arguments = {"logits": logits, "labels": torch.tensor([5000, 7, 0])}
    got = results(triton_op("cross_entropy"), arguments, ("logits",))
    expected = results(OPS["cross_entropy"].function, arguments, ("logits",))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for bad in (NAN, INF):  # and what makes a row NaN in the reference makes it NaN here
        logits[1, 9000] = bad
        loss, grad = results(triton_op("cross_entropy"), arguments, ("logits",))
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]
    logits[:] = -INF
    assert triton_op("cross_entropy")(**arguments).isnan().all()


def test_large_logits_keep_their_digits() -> None:
    """At 4096, one fp32 logsumexp would round the softmax's exponent to 2.4e-4."""
    logits = (4096 + normal(5, 501).bfloat16().float()).bfloat16().float() + normal(5, 501, seed=1).mul(
        512
    ).round().div(512)
    labels = torch.arange(5)
    loss, grad = results(triton_op("cross_entropy"), {"logits": logits, "labels": labels}, ("logits",))
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    assert relative_error(loss, exact.detach()) < 2e-7
    assert relative_error(grad, torch.autograd.grad(exact.sum(), wide)[0]) < 5e-7


# ---- views
# ----------------------------------------------------------------------------------------------------


def _strided(op: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(arguments of which some are views, argument -> its place among the forward operator's)."""
    if op in NORMS:
        rows = ("residual", "branch") if op.startswith("add") else ("x",)
        affine = {name: normal(24, seed=index + 1) for index, name in enumerate(OPS[op].differentiable[len(rows) :])}
        views = {name: normal(5, 3, 40 + 8 * index, seed=index)[..., 8:32] for index, name in enumerate(rows)}
        dtype = {"dtype": torch.float32} if op.startswith("add") else {}
        return {**views, **affine, "eps": 1e-5, **dtype}, {name: index for index, name in enumerate(rows)}
    if op == "rope":  # q and k of a fused q, k, v, without its first and last token
        tables = {"cos": normal(7, 5, seed=1), "sin": normal(7, 5, seed=2)}
        q, k, _ = normal(2, 9, 3, 60)[:, 1:-1].chunk(3, -1)
        return {"q": q, "k": k, **tables, "rotary_dim": 10, "interleaved": True}, {"q": 0, "k": 1}
    if op == "swiglu":  # the two halves of one product
        gate, up = normal(4, 3, 74).chunk(2, -1)
        return {"gate": gate, "up": up}, {"gate": 0, "up": 1}
    return {"logits": normal(6, 48)[:, :33], "labels": torch.arange(6)}, {"logits": 0}  # a padded vocabulary


@pytest.mark.parametrize("op", [*NORMS, "rope", "swiglu", "cross_entropy"])
def test_views_are_read_where_they_are(op: str) -> None:
    arguments, places = _strided(op)
    names = OPS[op].differentiable
    dense = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    expected = results(triton_op(op), dense, names)
    with Operators() as operators:
        got = results(triton_op(op), arguments, names)
    forward = operators.calls["rope_turn" if op == "rope" else f"{op}_forward"][0]
    for name, place in places.items():
        assert not arguments[name].is_contiguous()
        assert forward[place].data_ptr() == arguments[name].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0].is_contiguous()


@pytest.mark.parametrize("op", [*NORMS, "rope", "swiglu"])
def test_an_incoming_gradient_that_is_a_view_is_read_where_it_is(op: str) -> None:
    arguments, _ = _strided(op)
    names = OPS[op].differentiable
    shape = arguments[names[0]].shape
    wide = normal(*shape[:-1], shape[-1] + 16, seed=9)
    incoming = wide[..., 8:-8]
    all_incoming = (incoming,) * len(OPS[op].outputs)
    expected = results(triton_op(op), arguments, names, *(one.contiguous() for one in all_incoming))
    with Operators() as operators:
        got = results(triton_op(op), arguments, names, *all_incoming)
    backward = operators.calls["rope_turn"][1] if op == "rope" else operators.calls[f"{op}_backward"][0]
    assert backward[0].data_ptr() == incoming.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_last_stride_that_is_not_one_gives_the_same_bits(op: str) -> None:
    """Every differentiable argument with stride 2, and a gradient of stride 0."""
    arguments = OPS[op].examples["odd"]("cpu", torch.float32)
    names = OPS[op].differentiable
    apart = {name: torch.stack((arguments[name], arguments[name] + 1), -1)[..., 0] for name in names}
    expected = results(triton_op(op), arguments, names)
    ones = [torch.ones((), dtype=one.dtype).expand(one.shape) for one in expected[: len(OPS[op].outputs)]]
    got = results(triton_op(op), {**arguments, **apart}, names, *ones)
    for a, b in zip(got, expected, strict=True):
        if op == "linear_cross_entropy":  # torch's product may take another way for another layout
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(op: str) -> None:
    """A launch is opaque to autograd: the derivative of a gradient would be missing without a word, whatever gradient
    comes in.
    """
    arguments = OPS[op].examples["odd"]("cpu", torch.float32)
    name = OPS[op].differentiable[0]
    leaf = arguments[name].detach().requires_grad_()
    output = outputs_of(triton_op(op)(**{**arguments, name: leaf}))[0]
    for incoming in (torch.ones_like(output), torch.ones_like(output).requires_grad_()):
        with pytest.raises(KernelError, match=f"{op} of source 'triton' has no second derivative"):
            torch.autograd.grad(output, leaf, incoming, create_graph=True, retain_graph=True)


# ---- sums whose order is fixed
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_gradient_of_a_norms_weight_is_one_fixed_sum(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows are 5 tiles of 64, in 2 programs: tile t is added in program t % 2, in rising order; then the rows of a
    tile; then the programs, by torch's sum.
    """
    monkeypatch.setattr(module("_norm_rows"), "INTERPRETED_PROGRAMS", 2)
    names = OPS[op].differentiable
    arguments = {name: normal(*((300, 5) if name == "x" else (5,)), seed=index) for index, name in enumerate(names)}
    incoming = normal(300, 5, seed=7)
    got = results(triton_op(op), {**arguments, "eps": 1e-5}, names, incoming)
    wide = {name: value.double().requires_grad_() for name, value in arguments.items()}
    exact = OPS[op].exact(**wide, eps=1e-5)
    exact_gradients = torch.autograd.grad(exact, list(wide.values()), incoming.double())
    for name, a, b in zip(names, got[1:], exact_gradients, strict=True):
        assert relative_error(a, b) < 1e-6, name
    if op == "layer_norm":
        partial = torch.zeros(2, 64, 5)
        for tile, rows in enumerate(incoming.split(64)):
            partial[tile % 2, : len(rows)] += rows
        torch.testing.assert_close(got[3], partial.sum((0, 1)), rtol=1e-6, atol=1e-6)
    # Of 128 rows each program has one tile. 172 more, whose gradient is zero, change no bit: no row has moved to
    # another program.
    first = {**arguments, "x": arguments["x"][:128], "eps": 1e-5}
    expected = results(triton_op(op), first, names, incoming[:128])
    incoming[128:] = 0
    again = results(triton_op(op), {**arguments, "eps": 1e-5}, names, incoming)
    assert all(torch.equal(a, b) for a, b in zip(again[2:], expected[2:], strict=True))


def test_grad_norm_is_one_fixed_sum() -> None:
    """Two programs and a rest of three elements, several tensors, one of them empty and one not contiguous."""
    gradients = [normal(2 * 65536 + 3), normal(0), normal(33, 17, seed=1).t(), normal(1, seed=2).half()]
    norm = triton_op("grad_norm")(gradients)
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(float(norm) / float(exact) - 1) < 1e-7
    assert torch.equal(norm, triton_op("grad_norm")(gradients))


def test_the_norms_of_each_are_those_of_each_alone() -> None:
    """Dtypes in turn, a tensor that wide accesses cannot reach, several programs, and an empty one."""
    gradients = [normal(2 * 65536 + 3), normal(0), normal(33, 17, seed=1).t(), normal(70, seed=2).half(), normal(6)[1:]]
    each = module("grad_norm").IMPLEMENTATION.of_each(gradients)
    assert each.shape == (5,)
    assert torch.equal(each, torch.stack([triton_op("grad_norm")([gradient]) for gradient in gradients]))


class Launches(TorchDispatchMode):
    """Counts launches and the tensors that are made of host numbers or sent to a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        super().__init__()
        self.launches, self.made = 0, 0
        launch, tensor, arange = InterpretedFunction.__getitem__, torch.tensor, torch.arange

        def counted(kernel: Any, grid: Any) -> Any:
            self.launches += 1
            return launch(kernel, grid)

        monkeypatch.setattr(InterpretedFunction, "__getitem__", counted)
        for name, make in (("tensor", tensor), ("arange", arange)):
            monkeypatch.setattr(torch, name, self._counting(make))

    def _counting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.made += 1
            return make(*arguments, **named)

        return counted


def test_a_step_of_many_tensors_is_a_handful_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 matrices with compute copies and 15 norms without, as a bf16 run updates them; the second step makes no
    table.
    """
    adamw, of_each = triton_op("adamw"), module("grad_norm").IMPLEMENTATION.of_each
    groups = [[normal(24, 8, seed=i) for i in range(30)], [normal(9, seed=i) for i in range(15)]]
    gradients = [
        [normal(*parameter.shape, dtype=dtype) for parameter in group]
        for group, dtype in zip(groups, (torch.float16, torch.float32), strict=True)
    ]
    states = [[[torch.zeros_like(parameter) for parameter in group] for _ in range(2)] for group in groups]
    copies = [[parameter.half() for parameter in groups[0]], None]
    scale = torch.tensor(1.0)
    named = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    settings = {name: value for name, value in named.items() if not isinstance(value, list | Tensor)}
    counts = Launches(monkeypatch)
    for step in (1, 2):
        counts.launches = counts.made = 0
        of_each([gradient for group in gradients for gradient in group])
        norm_launches, counts.launches = counts.launches, 0
        for group, its_gradients, state, its_copies in zip(groups, gradients, states, copies, strict=True):
            adamw(group, its_gradients, *state, its_copies, **{**settings, "update_index": step}, gradient_scale=scale)
        assert norm_launches == 3  # of two dtypes, and the roots
        assert counts.launches == 2
    assert counts.made == 0


def test_tables_are_of_what_lies_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is remembered is of these addresses and sizes; others, and a forgotten one, are made."""
    lists = importlib.import_module("weftrain.kernels.triton_ops._tensor_lists")
    monkeypatch.setattr(lists, "_KEPT", 2)
    memory = normal(4096)
    first = lists.tensor_lists([[memory[:100], memory[200:300]]], 64)
    assert lists.tensor_lists([[memory[:100], memory[200:300]]], 64).table is first.table
    assert first.owner.tolist() == [0, 0, 1, 1]
    assert first.table.view(2, 4).tolist() == [
        [100, 0, 0, memory.data_ptr()],
        [100, 2, 0, memory.data_ptr() + 800],
    ]
    other = lists.tensor_lists([[memory[:100], memory[204:304]]], 64)
    assert other.table[7] == memory.data_ptr() + 816
    assert len(lists._kept) <= 2


@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_of_tensors_that_wide_accesses_cannot_reach(offset: int) -> None:
    size = 8192 + 1024 + 5
    arguments = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    lists = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "copies")
    made = {
        name: [normal(size + offset, seed=index).abs()[offset:], normal(7, seed=index).abs()]
        for index, name in enumerate(lists[:4])
    }
    made["copies"] = [torch.empty(size, dtype=torch.bfloat16), torch.empty(7, dtype=torch.bfloat16)]
    expected = {name: [tensor.clone() for tensor in value] for name, value in made.items()}
    triton_op("adamw")(**{**arguments, **made})
    OPS["adamw"].function(**{**arguments, **expected})
    for name in lists:
        torch.testing.assert_close(made[name], expected[name], rtol=1e-6, atol=3e-7)


def test_grad_norm_shows_what_is_not_finite_at_every_edge() -> None:
    size = 65536 + 4096 + 1
    for bad in (NAN, INF, -INF):
        for place in (0, 4095, 4096, 65535, 65536, size - 1):
            gradient = torch.ones(size, dtype=torch.float16)
            gradient[place] = bad
            norm = triton_op("grad_norm")([torch.ones(3), gradient])
            assert not norm.isfinite(), (bad, place)


# ---- the chunks of linear_cross_entropy
# ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest float tensor that anything made (the interpreter copies bytes besides), the matrix
    products, and the passes that add to a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products, self.adds = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
        self.adds += func in (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor)
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return output


def _in_the_operator(monkeypatch: pytest.MonkeyPatch) -> LargestTensor:
    """A dispatch mode does not look into an operator, so its launch is called in the operator's place."""
    lce = module("linear_cross_entropy")
    monkeypatch.setattr(lce, "_LOSS_AND_GRADIENTS", lce._launch)
    monkeypatch.setattr(lce, "_DIFFERENTIABLE", differentiable_loss("triton", lce._launch, scaled=lce._launch_scale))
    return LargestTensor()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_chunks_give_what_one_chunk_gives_and_never_all_logits(
    dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "hidden": normal(70, 12, dtype=dtype),
        "weight": normal(37, 12, seed=1, dtype=dtype),
        "labels": torch.arange(70) % 37,
        "z_loss": 1e-3,
    }
    names = ("hidden", "weight")
    whole = results(triton_op("linear_cross_entropy"), arguments, names)
    monkeypatch.setattr(module("linear_cross_entropy"), "CHUNK_ELEMENTS", 37 * 64)  # chunks of 64 and 6 rows
    with _in_the_operator(monkeypatch) as mode:
        chunked = results(triton_op("linear_cross_entropy"), arguments, names)
    for a, b in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    assert mode.elements == 37 * 64
    assert mode.products == 2 * 3
    # each chunk's product adds itself to the gradient of the weight; in 16 bits torch's products do so on CUDA alone
    assert mode.adds == (dtype == torch.float16)


@pytest.mark.parametrize(
    ("wanted", "products"), [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)]
)
def test_only_the_gradients_that_are_wanted_are_computed(
    wanted: tuple[str, ...], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float32)
    leaves = {name: arguments[name].detach().requires_grad_(name in wanted) for name in ("hidden", "weight")}
    with _in_the_operator(monkeypatch) as mode:
        loss = triton_op("linear_cross_entropy")(**{**arguments, **leaves})
    assert mode.products == products
    if wanted:
        loss.backward()
        _, *both = results(triton_op("linear_cross_entropy"), arguments, ("hidden", "weight"))
        assert all(torch.equal(leaves[name].grad, dict(zip(leaves, both, strict=True))[name]) for name in wanted)
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == list(wanted)


def test_sums_near_the_end_of_fp16_do_not_overflow() -> None:
    """256 tokens of one label with hidden states of 200: a gradient of 51,200 for that row of the weight, of at most
    65,504.
    """
    hidden = torch.full((256, 4), 200.0, dtype=torch.float16)
    weight = torch.zeros(64, 4, dtype=torch.float16)
    labels = torch.full((256,), 3)
    _, _, grad = results(
        triton_op("linear_cross_entropy"), {"hidden": hidden, "weight": weight, "labels": labels}, ("hidden", "weight")
    )
    assert grad.isfinite().all()
    assert float(grad[3, 0]) == pytest.approx(-51200 * 63 / 64, rel=2e-3)
    assert float(grad[0, 0]) == pytest.approx(51200 / 64, rel=2e-3)


# ---- groups of rows
# ----------------------------------------------------------------------------------------------------


def test_ends_that_lie_outside_of_the_rows_are_taken_within_them() -> None:
    """A GPU's values are not looked at before a launch, so no end may become an address."""
    launches = module("grouped_gemm")
    x, weight = normal(20, 9), normal(4, 5, 9, seed=1)
    wild = torch.tensor([-(2**20), 18, 7, 2**30], dtype=torch.int32)  # the last group begins where the one before ends
    within = torch.tensor([0, 18, 18, 20], dtype=torch.int32)
    got, expected = (launches._launch_products(x, weight, ends, True) for ends in (wild, within))
    assert torch.equal(got[:7], expected[:7])
    assert got.isfinite().all()
    got, expected = (launches._launch_outer_products(normal(20, 5), x, ends) for ends in (wild, within))
    assert torch.equal(got[:3], expected[:3])
    assert got.isfinite().all()


def test_only_the_gradients_of_groups_that_are_wanted_are_computed() -> None:
    arguments = OPS["grouped_gemm"].examples["odd_first_empty"]("cpu", torch.float32)
    for name, operator in (("x", "grouped_gemm_products"), ("weight", "grouped_gemm_outer_products")):
        output = triton_op("grouped_gemm")(**{**arguments, name: arguments[name].detach().requires_grad_()})
        with Operators() as operators:
            output.backward(torch.ones_like(output))
        assert {called: len(calls) for called, calls in operators.calls.items()} == {operator: 1}


# ---- symmetric products
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(3, 40), (33, 49)])  # one square; three by three, the last of one row
@pytest.mark.parametrize("halves", [1, 2])
def test_a_triangle_and_its_mirror_image_are_the_whole_product(rows: int, columns: int, halves: int) -> None:
    """Of integers that fp32 holds, so every bit is known. Tiles are squares, or halves of squares."""
    from weftrain.kernels.triton_ops import _symmetric_kernels as kernels

    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (2, rows, columns), generator=draw).float()
    gram, polynomial = (torch.full((2, rows, rows), NAN) for _ in range(2))
    how = {"BLOCK_M": 16 * halves, "BLOCK_N": 16, "BLOCK_K": 16, "PRECISION": "ieee"}
    side = -(-rows // (16 * halves))
    programs = (2 * side * (side + 1) // 2 * halves,)
    kernels.symmetric[programs](x, gram, rows, columns, 1.0, 0.0, OWN=False, **how)
    kernels.symmetric[programs](gram, polynomial, rows, rows, 2.0, -3.0, OWN=True, **how)
    assert torch.equal(gram, x @ x.mT)
    assert torch.equal(polynomial, 2 * gram @ gram - 3 * gram)


def test_each_square_of_a_large_triangle_has_its_place() -> None:
    """Also where the square root is rounded up to the next column."""
    from square_kernel import places

    for side in (1, 45, 1449, 11_585):  # the last: a matrix of 1.5 million rows
        rows, columns = (torch.empty(1024, dtype=torch.int32) for _ in range(2))
        first = max(0, side * (side - 1) // 2 - 512)
        places[(1,)](first, rows, columns, COUNT=1024)
        column = next(k for k in range(side + 1) if (k + 1) * (k + 2) // 2 > first)
        row = first - column * (column + 1) // 2
        for found in zip(rows.tolist(), columns.tolist(), strict=True):
            assert found == (row, column)
            row, column = (row + 1, column) if row < column else (0, column + 1)


def test_each_matrix_of_a_stack_has_the_bits_it_has_alone() -> None:
    how = {"a": 3.4445, "b": -4.775, "c": 2.0315, "iterations": 2, "eps": 1e-7}
    x = normal(2, 2, 19, 7) * torch.logspace(-3, 3, 4).view(2, 2, 1, 1)
    found = triton_op("newton_schulz")(x, **how)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(found[place], triton_op("newton_schulz")(x[place], **how))


# ---- rope, swiglu and the norms at their edges
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_many_heads_and_back(interleaved: bool) -> None:
    """33 heads of 128 are three blocks of heads, 17 two; the gradient of what was turned is what it was, turned
    back.
    """
    x = {"q": normal(2, 3, 33, 128), "k": normal(2, 3, 17, 128, seed=2)}
    angle = normal(2, 3, 24, seed=1)
    arguments = {**x, "cos": angle.cos(), "sin": angle.sin(), "rotary_dim": 48, "interleaved": interleaved}
    turned = triton_op("rope")(**arguments)
    torch.testing.assert_close(turned, OPS["rope"].function(**arguments), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(one[..., 48:], x[name][..., 48:]) for name, one in zip(x, turned, strict=True))
    back = results(triton_op("rope"), arguments, ("q", "k"), *turned)[2:]
    torch.testing.assert_close(back, list(x.values()), rtol=1e-5, atol=1e-5)
    for row in range(2):  # a row's own positions are those of a call with that row alone
        alone = {name: arguments[name][row : row + 1] for name in x} | {n: arguments[n][row] for n in ("cos", "sin")}
        for one, of_all in zip(triton_op("rope")(**{**arguments, **alone}), turned, strict=True):
            assert torch.equal(one[0], of_all[row])
    q, k = triton_op("rope")(**{**arguments, "k": x["k"][:, :, :0]})
    assert torch.equal(q, turned[0])
    assert k.shape == (2, 3, 0, 128)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_what_is_not_finite_in_its_pair(interleaved: bool) -> None:
    arguments = {**OPS["rope"].examples["odd"]("cpu", torch.float32), "interleaved": interleaved}
    for column, pair in (
        (2, {2, 3} if interleaved else {2, 8}),
        (11, {10, 11} if interleaved else {5, 11}),
        (12, {12}),
        (19, {19}),
    ):
        for index, name in enumerate(("q", "k")):
            x = arguments[name].clone()
            x[1, 5, 2, column] = NAN
            turned = triton_op("rope")(**{**arguments, name: x})
            bad = turned[index].isnan().nonzero().tolist()
            assert {tuple(place) for place in bad} == {(1, 5, 2, dimension) for dimension in pair}
            assert turned[1 - index].isfinite().all()


def test_rope_gives_cos_and_sin_no_gradient() -> None:
    arguments = OPS["rope"].examples["odd"]("cpu", torch.float32)
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("q", "cos", "sin")}
    torch.stack(triton_op("rope")(**{**arguments, **leaves})).sum().backward()
    assert leaves["q"].grad is not None
    assert leaves["cos"].grad is None
    assert leaves["sin"].grad is None


@pytest.mark.filterwarnings("error:overflow")
def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([-3e38, -1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4, 3e38])
    up = normal(10)
    got = results(triton_op("swiglu"), {"gate": gate, "up": up}, ("gate", "up"))
    wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
    exact = wide[0] * torch.sigmoid(wide[0]) * wide[1]
    for a, b in zip(got, (exact.detach(), *torch.autograd.grad(exact.sum(), wide)), strict=True):
        torch.testing.assert_close(a.double(), b.clamp(-3.4028234e38, 3.4028234e38), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", [(), (1,), (1024,), (1025,), (3, 341), (2, 0)])
def test_swiglu_of_any_shape(shape: tuple[int, ...]) -> None:
    arguments = {"gate": normal(*shape), "up": normal(*shape, seed=1)}
    got = results(triton_op("swiglu"), arguments, ("gate", "up"))
    for a, b in zip(got, results(OPS["swiglu"].function, arguments, ("gate", "up")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025])
def test_norms_around_the_block_size(op: str, n: int) -> None:
    names = OPS[op].differentiable
    arguments = {name: normal(*((3, n) if name == "x" else (n,)), seed=index) for index, name in enumerate(names)}
    incoming = normal(3, n, seed=7)
    got = results(triton_op(op), {**arguments, "eps": 0.1}, names, incoming)
    wide = {name: value.double().requires_grad_() for name, value in arguments.items()}
    exact = OPS[op].exact(**wide, eps=0.1)
    exact_gradients = torch.autograd.grad(exact, list(wide.values()), incoming.double())
    for name, a, b in zip(("output", *names), got, (exact.detach(), *exact_gradients), strict=True):
        # of one column, layer_norm's dx is 0
        assert float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) < 5e-7, name


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_of_rows_too_long_for_registers(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block and a rest, of 5 rows in one program, so that it adds to its partial sums in memory; against float64."""
    rows, n = 5, 4096 + 77
    monkeypatch.setattr(module("_norm_rows"), "INTERPRETED_PROGRAMS", 1)
    names = OPS[op].differentiable
    arguments: dict[str, Any] = {
        name: 3 + normal(rows, n, seed=index, dtype=dtype if name != "residual" else torch.float32)
        if name in ("x", "residual", "branch")
        else normal(n, seed=index)
        for index, name in enumerate(names)
    }
    wide = {name: value.double().requires_grad_() for name, value in arguments.items()}
    more = {"eps": 0.1} | ({"dtype": dtype} if "residual" in names else {})
    got = results(triton_op(op), {**arguments, **more}, names)
    if "residual" in names:
        more["dtype"] = torch.float64
    exact = outputs_of(OPS[op].exact(**wide, **more))
    exact_gradients = torch.autograd.grad(exact, list(wide.values()), [torch.ones_like(output) for output in exact])
    bound = 1e-6 if dtype == torch.float32 else 2e-3
    for name, a, b in zip((*OPS[op].outputs, *names), got, (*exact, *exact_gradients), strict=True):
        assert a.isfinite().all()
        assert relative_error(a, b.detach()) < bound, name


def test_the_programs_of_a_norms_backward_follow_the_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = module("_norm_rows")
    for count in (114, 132, 148):
        found = SimpleNamespace(multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert norms.programs_of(torch.device("cuda", 0), False) == 2 * count
        assert norms.programs_of(torch.device("cuda", 0), True) == count


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_a_nan_stays_in_its_row(op: str) -> None:
    arguments = OPS[op].examples["odd"]("cpu", torch.float32)
    arguments["x"][1, 2, 76] = NAN
    output, grad_x, *affine = results(triton_op(op), arguments, OPS[op].differentiable)
    for tensor in (output, grad_x):
        assert tensor.isnan().all(-1).nonzero().tolist() == [[1, 2]]
        assert int(tensor.isnan().sum()) == 77
    assert affine[0].isnan().all()  # the weight's gradient is a sum over rows


# ---- adamw
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["after_bias_correction", "before_bias_correction"])
def test_adamw_copies_are_the_rounded_weights(
    placement: str, gradient_dtype: torch.dtype, copy_dtype: torch.dtype | None
) -> None:
    """Sizes around the block of 1024 and none; a transposed gradient; gradients are left as they were."""
    sizes = ((0,), (1,), (31, 33), (1024,), (1025,))
    parameters = [normal(*size) for size in sizes]
    gradients = [
        normal(*size[::-1], seed=1, dtype=gradient_dtype).t()
        if len(size) == 2
        else normal(*size, seed=1, dtype=gradient_dtype)
        for size in sizes
    ]
    arguments: dict[str, Any] = {
        "parameters": parameters,
        "gradients": gradients,
        "exp_avgs": [normal(*size, seed=2) for size in sizes],
        "exp_avg_sqs": [normal(*size, seed=3).square() for size in sizes],
        "copies": None if copy_dtype is None else [torch.full(size, NAN, dtype=copy_dtype) for size in sizes],
        "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "update_index": 3,
        "eps_placement": placement, "gradient_scale": torch.tensor(0.7),
    }  # fmt: skip
    expected = {
        name: [tensor.clone() for tensor in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    before = [gradient.clone() for gradient in gradients]
    triton_op("adamw")(**arguments)
    OPS["adamw"].function(**expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(arguments[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-7)  # two roundings at 1
    for parameter, copy in zip(parameters, arguments["copies"] or [], strict=copy_dtype is not None):
        assert torch.equal(copy, parameter.to(copy_dtype))


def test_adamw_shows_a_bad_gradient_in_its_own_weight_alone() -> None:
    arguments = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    arguments["gradients"][2][77] = NAN
    triton_op("adamw")(**arguments)
    assert arguments["parameters"][2].isnan().nonzero().tolist() == [[77]]
    assert not any(
        tensor.isnan().any()
        for index in (0, 1, 3, 4)
        for tensor in (arguments["parameters"][index], arguments["exp_avgs"][index])
    )


def test_a_backward_through_weights_that_adamw_overwrote_is_refused() -> None:
    arguments = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    weight = arguments["parameters"][0].requires_grad_()
    loss = (weight * weight).sum()
    triton_op("adamw")(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adamw_of_no_parameters_does_nothing() -> None:
    arguments = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    empty: dict[str, Any] = {name: [] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "copies")}
    triton_op("adamw")(**{**arguments, **empty})
    assert not any(empty.values())
    before = OPS["adamw"].examples["odd"]("cpu", torch.float32)
    assert all(torch.equal(*pair) for name in empty for pair in zip(arguments[name], before[name], strict=True))


def test_what_changes_from_step_to_step_is_a_float() -> None:
    """Triton compiles anew for another integer that is 1 or a multiple of 16, and never for another float."""
    zeros = dict.fromkeys(("beta1", "beta2", "eps", "weight_decay"), 0)
    for placement in EPS_PLACEMENTS:
        for update_index in (1, 16):
            values = adamw_scalars(placement, learning_rate=1, **zeros, update_index=update_index)
            assert [type(value) for value in values] == [float] * 7


# ---- nothing to do
# ----------------------------------------------------------------------------------------------------


class _MustNotLaunch:
    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError(f"launched with grid {grid}")


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: _MustNotLaunch()[grid])


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_rows_launch_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lce = module(
        "linear_cross_entropy"
    )  # whose weight has a gradient of zeros, which the backward scales: by torch here
    monkeypatch.setattr(lce, "_DIFFERENTIABLE", differentiable_loss("triton", lce._LOSS_AND_GRADIENTS))
    arguments = OPS[op].examples["odd"]("cpu", torch.float32)
    with pytest.raises(AssertionError, match="launched with grid"):  # the fixture itself is seen to work
        triton_op(op)(**arguments)
    rowless = {"x", "residual", "branch", "q", "k", "gate", "up", "logits", "labels", "hidden"}
    empty = {name: value[:0] if name in rowless else value for name, value in arguments.items()}
    if "ends" in empty:
        empty["ends"] = torch.zeros_like(empty["ends"])
    got = results(triton_op(op), empty, OPS[op].differentiable)
    expected = results(OPS[op].function, empty, OPS[op].differentiable)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.usefixtures("no_launches")
def test_empty_tensors_launch_nothing() -> None:
    assert float(triton_op("grad_norm")([torch.empty(0), torch.empty(3, 0)])) == 0.0
    how = {"a": 1.5, "b": -0.5, "c": 0.0, "iterations": 1, "eps": 1e-7}
    for shape in ((0, 4, 3), (0, 5), (5, 0)):
        assert triton_op("newton_schulz")(torch.empty(shape), **how).shape == shape
    arguments = OPS["rope"].examples["odd"]("cpu", torch.float32)
    empty = {name: arguments[name][:, :0] for name in "qk"} | {name: arguments[name][:0] for name in ("cos", "sin")}
    assert [one.shape for one in triton_op("rope")(**{**arguments, **empty})] == [(2, 0, 3, 20)] * 2
    headless = {name: arguments[name][:, :, :0] for name in "qk"}
    assert [one.shape for one in triton_op("rope")(**{**arguments, **headless})] == [(2, 13, 0, 20)] * 2
