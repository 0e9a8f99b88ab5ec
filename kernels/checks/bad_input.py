"""Calls that cannot be meant, and calls at the edge of what can: the reference's error in the same words, or the
reference's result.

Labels and document starts are *values*. On a CPU a wrong one is refused; on an accelerator and in a compiled graph
nobody looks at it, and a label outside the vocabulary makes its token's loss NaN and no other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import evaluate, far
from weftrain.kernels.checks.findings import Case, Check, Subject, Verdict
from weftrain.kernels.contract import Arguments, KernelError, Spec
from weftrain.kernels.ops import OPS

Change = Callable[[Arguments], Arguments]


def _with(name: str, change: Callable[[Any], Any]) -> Change:
    """One argument changed."""
    return lambda arguments: {**arguments, name: change(arguments[name])}


def _first(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """The first tensor of a list changed."""
    return _with(name, lambda tensors: [change(tensors[0]), *tensors[1:]])


def _set(index: int | tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def _shorter(tensor: Tensor) -> Tensor:
    """One element less along the last axis."""
    return tensor[..., :-1].contiguous()


def _meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16 if tensor.dtype == torch.float32 else torch.float32)


def _uncontiguous(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


_WRONG_NORM: dict[str, Change] = {
    "weight too short": _with("weight", _shorter),
    "weight of rank 2": _with("weight", lambda weight: weight[None]),
    "x of integers": _with("x", torch.Tensor.int),
    "x without columns": _with("x", lambda x: x[..., :0]),
    "x 0-dimensional": _with("x", lambda x: x.flatten()[0]),
    "weight on another device": _with("weight", _meta),
}
_WRONG_LABELS: dict[str, Change] = {
    "labels too short": _with("labels", _shorter),
    "labels of int32": _with("labels", torch.Tensor.int),
    "labels of rank 2": _with("labels", lambda labels: labels[:, None]),
    "labels on another device": _with("labels", _meta),
}
_WRONG_LABEL_VALUES: dict[str, Change] = {
    "label negative": _with("labels", _set(1, -1)),
    "label too large": _with("labels", _set(1, 101)),
    "label far outside": _with("labels", _set(1, 2**62)),
}
_WRONG: dict[str, dict[str, Change]] = {
    "rms_norm": _WRONG_NORM,
    "layer_norm": {
        **_WRONG_NORM,
        "bias too short": _with("bias", _shorter),
        "bias on another device": _with("bias", _meta),
    },
    "rope": {
        "x of rank 3": _with("x", lambda x: x[0]),
        "x of integers": _with("x", torch.Tensor.int),
        "rotary_dim odd": _with("rotary_dim", lambda dim: dim - 1),
        "rotary_dim beyond the head": _with("rotary_dim", lambda dim: dim + 100),
        "rotary_dim 0": _with("rotary_dim", lambda dim: 0),
        "cos of too few tokens": _with("cos", lambda cos: cos[:-1]),
        "sin too narrow": _with("sin", _shorter),
        "sin on another device": _with("sin", _meta),
    },
    "swiglu": {
        "up too short": _with("up", _shorter),
        "up of another dtype": _with("up", _other_dtype),
        "gate of integers": _with("gate", torch.Tensor.int),
        "up on another device": _with("up", _meta),
    },
    "attention": {
        "q of rank 3": _with("q", lambda q: q[0]),
        "k of fewer tokens": _with("k", lambda k: k[:, :-1]),
        "v of fewer heads": _with("v", lambda v: v[:, :, :-1]),
        "k of another dtype": _with("k", _other_dtype),
        "k on another device": _with("k", _meta),
        "document_start of int64": _with("document_start", torch.Tensor.long),
        "document_start of too few tokens": _with("document_start", _shorter),
        "document_start on another device": _with("document_start", _meta),
    },
    "cross_entropy": {
        "logits of rank 3": _with("logits", lambda logits: logits[None]),
        "logits of integers": _with("logits", torch.Tensor.int),
        "an empty vocabulary": _with("logits", lambda logits: logits[:, :0]),
        **_WRONG_LABELS,
    },
    "linear_cross_entropy": {
        "hidden of rank 3": _with("hidden", lambda hidden: hidden[None]),
        "weight too narrow": _with("weight", _shorter),
        "weight of another dtype": _with("weight", _other_dtype),
        "weight on another device": _with("weight", _meta),
        "an empty vocabulary": _with("weight", lambda weight: weight[:0]),
        **_WRONG_LABELS,
    },
    "adamw": {
        "unknown eps_placement": _with("eps_placement", lambda _: "nowhere"),
        "update_index 0": _with("update_index", lambda _: 0),
        "gradient_scale of rank 1": _with("gradient_scale", lambda scale: scale[None]),
        "gradient_scale of bf16": _with("gradient_scale", torch.Tensor.bfloat16),
        "gradient_scale on another device": _with("gradient_scale", _meta),
        "a gradient too few": _with("gradients", lambda tensors: tensors[:-1]),
        "a moment too many": _with("exp_avgs", lambda tensors: [*tensors, tensors[0]]),
        "a copy too few": _with("copies", lambda tensors: tensors[:-1]),
        "a gradient of another shape": _first("gradients", _shorter),
        "a moment of another shape": _first("exp_avg_sqs", _shorter),
        "a gradient of integers": _first("gradients", torch.Tensor.int),
        "a gradient on another device": _first("gradients", _meta),
        "a parameter of bf16": _first("parameters", torch.Tensor.bfloat16),
        "a moment of fp16": _first("exp_avgs", torch.Tensor.half),
        "a copy of fp32": _first("copies", torch.Tensor.float),
        "a parameter that is not contiguous": _first("parameters", _uncontiguous),
        "a copy that is not contiguous": _first("copies", _uncontiguous),
    },
    "grad_norm": {
        "no gradients": _with("gradients", lambda _: []),
        "a gradient of integers": _first("gradients", torch.Tensor.int),
        "a gradient on another device": _with("gradients", lambda tensors: [*tensors[:-1], _meta(tensors[-1])]),
    },
}
_WRONG_VALUES: dict[str, dict[str, Change]] = {
    "attention": {
        "document_start in the future": _with("document_start", _set((0, 3), 4)),
        "document_start negative": _with("document_start", _set((0, 3), -1)),
    },
    "cross_entropy": _WRONG_LABEL_VALUES,
    "linear_cross_entropy": _WRONG_LABEL_VALUES,
}


def _wrong_cases(subject: Subject) -> list[Case]:
    wrong = dict(_WRONG[subject.op.name])
    if subject.device == "cpu":
        wrong |= _WRONG_VALUES.get(subject.op.name, {})
    return [
        _changed(case, name, change)
        for case in subject.quick(1)
        for name, change in wrong.items()
        if _applies(case, name)
    ]


def _applies(case: Case, name: str) -> bool:
    """An example without documents has no document starts to change."""
    return "document" not in name or case.build()["document_start"] is not None


def _changed(case: Case, name: str, change: Change) -> Case:
    return Case(name, case.dtype, lambda: change(case.build()))


def _judge_refused(subject: Subject, case: Case) -> Verdict:
    """The same KernelError as the reference's, by its first words."""
    try:
        subject.op.function(**case.build())
    except KernelError as error:
        expected = str(error)
    else:
        return Verdict(False, "the reference itself accepts this call: it is no wrong call")
    try:
        subject.implementation.function(**case.build())
    except KernelError as error:
        same = str(error).split()[:4] == expected.split()[:4]
        return Verdict(same, f"refused: {error}" if same else f"refused as '{error}', by the reference as '{expected}'")
    except Exception as error:  # code under test raised something else: that is the finding
        return Verdict(
            False, f"raised {type(error).__name__} instead of a KernelError: {' '.join(str(error).split())[:200]}"
        )
    return Verdict(False, f"was accepted; the reference refuses it: {expected}")


# ---- the edge of what can be meant
# ----------------------------------------------------------------------------------------------------


def _no_rows(*names: str) -> Change:
    return lambda arguments: {
        **arguments,
        **{name: arguments[name][:0] for name in names if arguments[name] is not None},
    }


def _tokens(count: int) -> Change:
    """Attention and rope of so many tokens."""

    def change(arguments: Arguments) -> Arguments:
        if "x" in arguments:
            return {
                **arguments,
                "x": arguments["x"][:, :count],
                "cos": arguments["cos"][:count],
                "sin": arguments["sin"][:count],
            }
        cut = {
            name: arguments[name][:, :count]
            for name in ("q", "k", "v", "document_start")
            if arguments[name] is not None
        }
        return {**arguments, **cut}

    return change


def _one_column(*names: str) -> Change:
    return lambda arguments: {**arguments, **{name: arguments[name][..., :1] for name in names}}


def _empty_tensor(arguments: Arguments) -> Arguments:
    """A tensor without elements among the others."""
    return {
        name: [*value, value[0].flatten()[:0]] if isinstance(value, (list, tuple)) and value else value
        for name, value in arguments.items()
    }


def _everything_ignored(arguments: Arguments) -> Arguments:
    return {**arguments, "labels": torch.full_like(arguments["labels"], -100)}


_NORM_EDGES: dict[str, Change] = {"no rows": _no_rows("x"), "one row": _with("x", lambda x: x[:1, :1])}
_LOSS_EDGES: dict[str, Change] = {
    "everything ignored": _everything_ignored,
    "ignore_index within the vocabulary": lambda arguments: {
        **arguments,
        "ignore_index": 7,
        "labels": arguments["labels"].masked_fill(arguments["labels"] == -100, 7),
    },
}
_EDGES: dict[str, dict[str, Change]] = {
    "rms_norm": {**_NORM_EDGES, "one column": _one_column("x", "weight")},
    "layer_norm": {**_NORM_EDGES, "one column": _one_column("x", "weight", "bias")},
    "rope": {
        "no tokens": _tokens(0),
        "one token": _tokens(1),
        "three tokens": _tokens(3),
        "no batch": _no_rows("x"),
        "one pair turns": lambda a: {**a, "rotary_dim": 2, "cos": a["cos"][:, :1], "sin": a["sin"][:, :1]},
    },
    "swiglu": {
        "no rows": _no_rows("gate", "up"),
        "one element": lambda a: {name: a[name][:1, :1] for name in ("gate", "up")},
        "rank 1": lambda a: {name: a[name][0] for name in ("gate", "up")},
        "rank 4": lambda a: {name: a[name][None, :, None] for name in ("gate", "up")},
    },
    "attention": {
        "no tokens": _tokens(0),
        "one token": _tokens(1),
        "two tokens": _tokens(2),
        "no batch": _no_rows("q", "k", "v", "document_start"),
        "no documents": _with("document_start", lambda _: None),
        "every token a document": _with(
            "document_start", lambda start: torch.arange(start.shape[1], device=start.device).int().expand(start.shape)
        ),
    },
    "cross_entropy": {
        "no rows": _no_rows("logits", "labels"),
        "one row": lambda a: {**a, "logits": a["logits"][1:2], "labels": a["labels"][1:2]},
        "a vocabulary of one": lambda a: {**a, "logits": a["logits"][:, :1], "labels": a["labels"].clamp(max=0)},
        **_LOSS_EDGES,
    },
    "linear_cross_entropy": {
        "no rows": _no_rows("hidden", "labels"),
        "one row": lambda a: {**a, "hidden": a["hidden"][1:2], "labels": a["labels"][1:2]},
        "a vocabulary of one": lambda a: {**a, "weight": a["weight"][:1], "labels": a["labels"].clamp(max=0)},
        "one feature": _one_column("hidden", "weight"),
        **_LOSS_EDGES,
    },
    "adamw": {
        "a tensor without elements": _empty_tensor,
        "a scale of zero": _with("gradient_scale", torch.zeros_like),
    },
    "grad_norm": {
        "a tensor without elements": _empty_tensor,
        "zeros only": _with("gradients", lambda tensors: [torch.zeros_like(tensor) for tensor in tensors]),
        "one element": _with("gradients", lambda tensors: [tensors[0].flatten()[:1]]),
    },
}


def _edge_cases(subject: Subject) -> list[Case]:
    def taken(case: Case) -> bool:
        attributes = {**subject.op.attributes, **subject.op.attributes_of(case.build())}
        return (
            subject.implementation.unavailable(Spec(subject.op.name, "example", subject.device, case.dtype, attributes))
            is None
        )

    changes = _EDGES[subject.op.name].items()
    edges = [
        _changed(case, name, change) for case in subject.quick(1) for name, change in changes if _applies(case, name)
    ]
    return [case for case in edges if taken(case)]


def _judge_edge(subject: Subject, case: Case) -> Verdict:
    """The reference's results, gradients too."""
    op = subject.op
    expected = evaluate(op, op.function, case.build())
    got = evaluate(op, subject.implementation.function, case.build())
    wrong = far(got, expected, case.dtype)
    return Verdict(not wrong, f"not the reference's: {', '.join(wrong)}" if wrong else "the reference's result")


# ---- labels that nobody looks at
# ----------------------------------------------------------------------------------------------------


def _label_cases(subject: Subject) -> list[Case]:
    if not subject.op.name.endswith("cross_entropy"):
        return []
    cases = subject.quick(1)
    return [_changed(case, name, change) for case in cases for name, change in _WRONG_LABEL_VALUES.items()]


def _judge_unseen_label(subject: Subject, case: Case) -> Verdict:
    """In a compiled graph (on an accelerator also without one): NaN for its token, the other rows as they were, and no
    crash.
    """
    op, function = subject.op, subject.implementation.function
    if subject.device == "cpu":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = evaluate(op, function, case.build())["output"]
    if subject.device == "cpu":
        torch._dynamo.reset()
    if got.dim() == 0:
        return Verdict(
            bool(got.isnan()), "the sum is NaN" if bool(got.isnan()) else f"the sum is {float(got)}; it must be NaN"
        )
    good = OPS[op.name].function(**op.examples[op.smallest](subject.device, case.dtype))
    others = torch.arange(got.shape[0], device=got.device) != 1
    alike = not far({"loss": got[others]}, {"loss": good[others]}, case.dtype)
    right = bool(got[1].isnan()) and alike
    others_are = "as they were" if alike else "changed"
    return Verdict(
        right, "NaN in its row alone" if right else f"its row is {float(got[1])}, the others are {others_are}"
    )


CHECKS = (
    Check("refused", "wrong calls are refused in the reference's words", _wrong_cases, _judge_refused),
    Check("edges", "no rows, no tokens, one column: the reference's result", _edge_cases, _judge_edge),
    Check(
        "unseen_labels",
        "a label outside the vocabulary gives NaN where values are not looked at",
        _label_cases,
        _judge_unseen_label,
    ),
)
