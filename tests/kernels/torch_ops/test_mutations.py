"""Faults planted in every torch implementation: a check that does not find its fault is no check.

What a reader would get wrong: `old` is text of the file. When the file changes and the text is gone, the test fails:
write the fault anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FP32, BF16 = torch.float32, torch.bfloat16

# (op, what, check, example, old, new, dtype)
FAULTS: list[tuple[str, str, str, str, str, str, torch.dtype]] = [
    ("rms_norm", "weight after the rounding", "rounded_once", "odd",
     "weight.float(), eps).to(x.dtype)", "None, eps).to(x.dtype) * weight", BF16),
    ("rms_norm", "eps left out", "numerics", "odd", ", eps).to", ", 0.0).to", FP32),
    ("layer_norm", "computed in bf16", "rounded_once", "odd",
     "x.float(), (x.shape[-1],), weight.float(), bias.float(), eps", "x, (x.shape[-1],), weight, bias, eps", BF16),
    ("layer_norm", "bias left out", "numerics", "odd", "bias.float(), eps", "bias.float() * 0.999, eps", FP32),
    ("add_rms_norm", "norm of the branch", "numerics", "odd", "total.float()", "branch.float()", FP32),
    ("add_rms_norm", "rounded to the residual's dtype", "norm_of_sum", "odd_fp32_output", ".to(dtype)", ".to(residual.dtype).to(dtype)", BF16),
    ("add_rms_norm", "norm of the sum before it is rounded", "norm_of_sum", "odd", "total.float()", "residual.float() + branch.float()", BF16),
    ("add_layer_norm", "sum in the branch's dtype", "norm_of_sum", "odd_fp32_residual", "residual + branch", "(residual + branch).to(branch.dtype).to(residual.dtype)", BF16),
    ("rope", "turns the other way", "numerics", "odd", "second * cos + first * sin, rest", "second * cos - first * sin, rest", FP32),
    ("rope", "interleaved turns the other way", "numerics", "odd_interleaved",
     "first * cos - second * sin, second", "first * cos + second * sin, second", FP32),
    ("rope", "angles of the last row", "numerics", "odd_own_positions",
     "cos = cos.to(q.dtype)", "cos = cos.expand(len(q), *cos.shape[-2:])[-1:].to(q.dtype)", FP32),
    ("rope", "k not turned", "numerics", "odd", ", _turned(k, cos, sin, rotary_dim, interleaved)", ", k", FP32),
    ("swiglu", "another activation", "numerics", "odd", "F.silu(gate)", "F.gelu(gate)", FP32),
    ("swiglu", "halves exchanged", "numerics", "edge", "F.silu(gate) * up", "F.silu(up) * gate", FP32),
    ("attention", "next token visible", "numerics", "odd", "key[None, :] > query[:, None]", "key[None, :] > query[:, None] + 1", FP32),
    ("attention", "document before visible", "numerics", "odd_documents", "(key < start[", "(key + 1 < start[", FP32),
    ("attention", "row sums not subtracted", "numerics", "odd", " - probabilities * weighted.sum(-1, keepdim=True)", "", FP32),
    ("attention", "last block of keys left out", "numerics", "odd_blocks", "grad_k[:, seen] +=", "grad_k[:, seen] =", FP32),
    ("attention", "window of one key more", "numerics", "odd_window",
     "query[:, None] - block.window", "query[:, None] - block.window - 1", FP32),
    ("attention", "first key of a block's window left out", "numerics", "odd_window", "first - window + 1, 0", "first - window + 2, 1", FP32),
    ("attention", "values of other keys in the backward", "numerics", "odd_window",
     "torch.bmm(grad[:, rows], v[:, seen]", "torch.bmm(grad[:, rows], v[:, : seen.stop - seen.start]", FP32),
    ("attention", "keys of the window's first block alone", "numerics", "odd_window", "grad_k[:, seen] +=", "grad_k[:, : seen.stop - seen.start] +=", FP32),
    ("attention", "key heads in turn", "numerics", "odd_grouped_window",
     "x.unflatten(2, (kv_heads, group)).transpose(1, 2)", "x.unflatten(2, (group, kv_heads)).transpose(2, 3).transpose(1, 2)", FP32),
    ("attention", "heads of a token apart", "numerics", "odd_grouped",
     "hidden.repeat_interleave(block.group, -2)", "hidden.repeat(*[1] * (hidden.dim() - 2), block.group, 1)", FP32),
    ("attention", "only the first query head of a key", "numerics", "odd_grouped",
     "torch.bmm(grad_scores.transpose(1, 2), q[:, rows])",
     "torch.bmm(grad_scores[:, :: block.group].transpose(1, 2), q[:, rows][:, :: block.group])", FP32),
    ("attention", "documents of another key head", "numerics", "odd_grouped_window",
     "document_start.repeat_interleave(kv_heads, 0)", "document_start.repeat(kv_heads, 1)", FP32),
    ("attention", "accepts a head too many", "refused", "k and v of a head too many",
     "    check_attention(q, k, v, document_start, window)\n", "", FP32),
    ("attention", "refuses nothing", "refused", "k of fewer tokens", "    check_attention(q, k, v, document_start, window)\n", "", FP32),
    ("cross_entropy", "z-loss not squared", "numerics", "odd_scaled", "maximum.squeeze(1)).square()", "maximum.squeeze(1))", FP32),
    ("cross_entropy", "offset kept", "offset_logits", "odd", "shifted = scaled - maximum", "shifted = scaled - 0 * maximum", FP32),
    ("cross_entropy", "ignored rows counted", "numerics", "odd", "torch.where(kept, loss, 0.0)", "torch.where(kept, loss, loss)", FP32),
    ("cross_entropy", "capped before the scale", "numerics", "odd_capped",
     "torch.tanh(scaled / logits_softcap) * logits_softcap", "torch.tanh(logits.float() / logits_softcap) * logits_softcap * logits_scale", FP32),
    ("linear_cross_entropy", "softcap without its derivative", "numerics", "odd_capped", "derivative = 1 - tanh.square()", "derivative = torch.ones_like(tanh)", FP32),
    ("linear_cross_entropy", "softcap's derivative not at the label", "numerics", "odd_capped", "slope_at_label * derivative.gather(1, label)", "slope_at_label", FP32),
    ("cross_entropy", "wrong label unseen", "unseen_labels", "label too large", '.masked_fill(outside, float("nan"))', "", FP32),
    ("linear_cross_entropy", "half of the z-loss gradient", "numerics", "odd_scaled", "1 + 2 * z_loss", "1 + z_loss", FP32),
    ("cross_entropy", "smoothing over the other classes alone", "numerics", "odd_smoothed",
     "shifted.mean(-1)", "(shifted.sum(-1) - at_label) / (shifted.shape[1] - 1)", FP32),
    ("cross_entropy", "weight of an ignored token looked at", "numerics", "odd_weighted",
     "token_weights.detach().masked_fill(~kept, 0.0)", "token_weights.detach()", FP32),
    ("linear_cross_entropy", "weights not in the gradient", "numerics", "odd_weighted",
     "loss, row_scale = loss * weights, row_scale * weights", "loss = loss * weights", FP32),
    ("linear_cross_entropy", "smoothing at the label alone", "numerics", "odd_smoothed",
     "exponential = exponential - everywhere", "pass", FP32),
    ("linear_cross_entropy", "statistic in bf16", "numerics", "odd",
     "log_total = total.log()", "log_total = total.log().bfloat16().float()", FP32),
    ("linear_cross_entropy", "offset kept", "offset_logits", "odd", "log_total + (maximum - at_label)", "logsumexp - at_label", FP32),
    ("linear_cross_entropy", "products under autocast", "autocast", "odd", "@outside_autocast\n", "", FP32),
    ("attention", "second derivatives of constants", "second_derivatives", "odd_small",
     '    @first_derivatives_only("attention", "torch")\n', "", FP32),
    ("attention", "products under autocast", "autocast", "odd_small", "@outside_autocast\ndef attention_blocked", "def attention_blocked", FP32),
    ("adamw", "eps on the wrong side", "numerics", "odd_large_eps",
     "variance.sqrt() / correction2_sqrt + eps", "(variance.sqrt() + eps) / correction2_sqrt", FP32),
    ("adamw", "gradient unscaled", "numerics", "odd", "gradient.float() * gradient_scale", "gradient.float()", FP32),
    ("grad_norm", "sums absolute values", "numerics", "edge", ".square().sum(1)", ".abs().sum(1)", FP32),
    ("grad_norm", "rest left out", "numerics", "odd", "if rows * _ROW < flat.shape[0]", "if rows * _ROW + 1 < flat.shape[0]", FP32),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault[0]}-{fault[1].replace(' ', '_')}" for fault in FAULTS])
def test_a_planted_fault_is_found(fault: Any, tmp_path: Path, examine: Callable[..., Any]) -> None:
    op, _, check, example, old, new, dtype = fault
    report = examine("torch_ops", op, f"{op}.py", old, new, check, example, dtype, tmp_path)
    assert report.failed, [finding.detail for finding in report]
    if check == "numerics":
        assert not any(finding.detail.startswith("raised") for finding in report), (
            "the fault must be found, and not be one of syntax"
        )


def test_text_that_is_gone_is_noticed(tmp_path: Path, examine: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="write the fault anew: no such text"):
        examine("torch_ops", "swiglu", "swiglu.py", "no such text", "", "numerics", "odd", FP32, tmp_path)
