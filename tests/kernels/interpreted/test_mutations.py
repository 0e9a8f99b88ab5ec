"""Faults planted in every Triton kernel, interpreted: a check that does not find its fault is no check.

What a reader would get wrong: `old` is text of the kernel's file. When the file changes and the text is gone, the test
fails: write the fault anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import parameters

BF16 = torch.bfloat16
_STATISTIC = "r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x_tile * x_tile, 1) / n + eps))"
_ONE_LOAD = "tl.load(x + row[:, None] * x_row_stride + column, mask=here, other=0.0)"
_UNMASKED = "tl.load(x + row[:, None] * x_row_stride + column)"
_LAST_PASS = "gradient.to(logits.dtype.element_ty), mask=inside)"
_Q_TILE = "_tile(q_base, row, q_token, T - first, HEAD_DIM, BLOCK_D, {})"
_LSE = "row_max + tl.math.log2(row_sum)"

# (op, file, what, check, example, old, new, dtype)
FAULTS: list[tuple[str, str, str, str, str, str, str, torch.dtype]] = [
    ("rms_norm", "_norm_rows.py", "gradient term left out", "numerics", "odd",
     "r * (centred - xhat * (tl.sum(g * xhat, 1) / n)[:, None])", "r * centred", torch.float32),
    ("rms_norm", "_norm_rows.py", "statistic in fp16", "numerics", "odd", _STATISTIC, _STATISTIC + ".to(tl.float16).to(tl.float32)", torch.float32),
    ("rms_norm", "_norm_rows.py", "statistic in the dtype of x", "rounded_once", "odd",
     _STATISTIC, _STATISTIC + ".to(x.dtype.element_ty).to(tl.float32)", BF16),
    ("rms_norm", "_norm_rows.py", "weight after the rounding", "rounded_once", "odd",
     "y_tile = x_tile * r[:, None] *", "y_tile = (x_tile * r[:, None]).to(y.dtype.element_ty).to(tl.float32) *", BF16),
    ("rms_norm", "_norm_rows.py", "load without a mask", "bounds", "odd", _ONE_LOAD, _UNMASKED, torch.float32),
    ("rms_norm", "_norm_rows.py", "store without a mask", "bounds", "edge_head_96",
     "y_tile.to(y.dtype.element_ty), mask=here)", "y_tile.to(y.dtype.element_ty))", torch.float32),
    ("rms_norm", "_norm_rows.py", "rows after the last one", "bounds", "edge_head_64", "here = row_here[:, None] & inside", "here = inside", torch.float32),
    ("rms_norm", "_norm_rows.py", "last column left out", "numerics", "odd", "row < rows, column < n", "row < rows, column < n - 1", torch.float32),
    ("rms_norm", "_norm_rows.py", "last rows left out", "numerics", "edge_head_80", "row < rows, column < n", "row < rows - 1, column < n", torch.float32),
    ("rms_norm", "_norm_rows.py", "rows of the last wave left out", "numerics", "odd_waves",
     "range(tl.cdiv(rows, programs * ROWS))", "range(rows // (programs * ROWS))", torch.float32),
    ("rms_norm", "_norm_rows.py", "only the last row of a tile", "numerics", "edge_head_128",
     "tl.sum(dw, 0)[None, :]", "tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == ROWS - 1, dw, 0.0), 0)[None, :]", torch.float32),
    ("layer_norm", "_norm_rows.py", "gradient term left out", "numerics", "odd",
     "centred = g - (tl.sum(g, 1) / n)[:, None]", "centred = g", torch.float32),
    ("layer_norm", "_norm_rows.py", "padding in the variance", "numerics", "odd",
     "tl.where(inside, x_tile - m[:, None], 0.0)", "x_tile - m[:, None]", torch.float32),
    ("layer_norm", "_norm_rows.py", "statistic in the dtype of x", "rounded_once", "odd",
     _STATISTIC, _STATISTIC + ".to(x.dtype.element_ty).to(tl.float32)", BF16),
    ("layer_norm", "_norm_rows.py", "only the last tile of a program", "numerics", "odd_waves", "db += dy_tile", "db = dy_tile", torch.float32),
    ("layer_norm", "_norm_rows.py", "load without a mask", "bounds", "odd", _ONE_LOAD, _UNMASKED, torch.float32),
    ("add_rms_norm", "_norm_rows.py", "norm of the sum before it is rounded", "norm_of_sum", "odd",
     "x_tile = rounded.to(tl.float32)", "x_tile = x_tile + branch_tile.to(tl.float32)", BF16),
    ("add_rms_norm", "_norm_rows.py", "gradient of the sum left out", "numerics", "odd",
     "dx_tile += tl.load(dtotal_row + column, mask=here, other=0.0).to(tl.float32)", "dx_tile += 0.0", torch.float32),
    ("add_layer_norm", "_norm_rows.py", "half of the branch's gradient", "numerics", "odd_fp32_residual",
     "dx_tile.to(dbranch.dtype.element_ty)", "(0.5 * dx_tile).to(dbranch.dtype.element_ty)", BF16),
    ("add_layer_norm", "_norm_rows.py", "gradients of the sum and of its norm exchanged", "numerics", "odd",
     "tl.load(dy + row[:, None]", "tl.load(dtotal + row[:, None]", torch.float32),
    ("rope", "rope.py", "backward turns forward", "numerics", "odd", "        s = -s\n", "        s = s\n", torch.float32),
    ("rope", "rope.py", "last column of the rest left out", "numerics", "odd",
     "& (rest < head_dim)", "& (rest < head_dim - 1)", torch.float32),
    ("rope", "rope.py", "heads without a mask", "bounds", "odd_interleaved",
     "both_here = (head < heads) & (column < 2 * half)", "both_here = column < 2 * half", torch.float32),
    ("rope", "rope.py", "angles of the next token", "numerics", "odd",
     "row * table_stride + token * half", "row * table_stride + (token ^ 1) * half", torch.float32),
    ("rope", "rope.py", "angles of the first row", "numerics", "odd_own_positions",
     "row * table_stride + token * half", "token * half", torch.float32),
    ("rope", "rope.py", "k with q's block of heads", "bounds", "odd_interleaved",
     "(block - q_blocks) * K_BLOCK", "block * K_BLOCK", torch.float32),
    ("swiglu", "swiglu.py", "gradient term left out", "numerics", "odd", "(1.0 + g * (1.0 - s))", "(1.0 + g)", torch.float32),
    ("swiglu", "swiglu.py", "load without a mask", "bounds", "odd",
     "tl.load(up + row * up_row_stride + column, mask=inside, other=0.0)", "tl.load(up + row * up_row_stride + column)", torch.float32),
    ("swiglu", "swiglu.py", "last block left out", "bounds", "edge_above",
     "inside = column < n", "inside = column < n // BLOCK * BLOCK", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "sum not rescaled between blocks", "numerics", "edge_above",
     "total = total * tl.exp(before - shift) + ", "total = total + ", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "label off by one", "numerics", "odd",
     "tl.where(column == label,", "tl.where(column == label + 1,", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "half of the z-loss gradient", "numerics", "odd_scaled",
     "(2.0 * z_loss", "(1.0 * z_loss", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "load at the label without a mask", "bounds", "odd",
     "load_logits(x, label, valid,", "load_logits(x, label, label == label,", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "load without a mask", "bounds", "odd",
     "tl.load(x + column, mask=mask, other=0.0)", "tl.load(x + column)", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "softcap without its derivative", "numerics", "odd_capped",
     "gradient *= 1.0 - bent * bent", "gradient *= 1.0", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "another tanh near 0", "numerics", "edge_capped",
     "series * z + 0.1333320588", "series * z + 0.1330320588", torch.float32),
    ("cross_entropy", "cross_entropy.py", "statistic in fp16", "numerics", "odd",
     "tl.store(total + row, row_total)", "tl.store(total + row, row_total.to(tl.float16).to(tl.float32))", torch.float32),
    ("cross_entropy", "cross_entropy.py", "statistic in bf16", "rounded_once", "odd",
     "tl.store(total + row, row_total)", "tl.store(total + row, row_total.to(tl.bfloat16).to(tl.float32))", BF16),
    ("linear_cross_entropy", "linear_cross_entropy.py", "scale twice in the gradient", "numerics", "odd_scaled",
     "1.0 if weight is None else weight", "scale if weight is None else weight", torch.float32),
    ("linear_cross_entropy", "linear_cross_entropy.py", "all of the label in the gradient", "numerics", "odd_smoothed",
     "label_factor * (1.0 - smoothing)", "label_factor * 1.0", torch.float32),
    ("cross_entropy", "cross_entropy.py", "weights not in the gradient", "numerics", "odd_weighted",
     "incoming = incoming * tl.load(token_weights + row)", "incoming = incoming * 1.0", torch.float32),
    ("cross_entropy", "_softmax_rows.py", "mean logit below the maximum of the block", "numerics", "edge_weighted",
     "below + further + ", "below + ", torch.float32),
    ("linear_cross_entropy", "linear_cross_entropy.py", "store without a mask", "bounds", "odd",
     _LAST_PASS, "gradient.to(logits.dtype.element_ty))", torch.float32),
    ("linear_cross_entropy", "linear_cross_entropy.py", "last column left out", "numerics", "odd",
     "inside = column < columns", "inside = column < columns - 1", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "matrix of the group before", "numerics", "odd",
     "(through <= tile)", "(through < tile)", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "each tile at the first rows of its group", "numerics", "odd",
     "start - (through - tiles) * BLOCK_M, 0), 0) + tile * BLOCK_M", "start, 0), 0)", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "products for rows of no group", "edges", "rows of no group",
     "tl.where(group == groups, 0, depth)", "tl.where(group == groups, depth, depth)", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "last row not in the gradient of the weight", "numerics", "odd",
     "k < end - first - done", "k < end - first - done - 1", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "load without a mask", "bounds", "odd",
     "tl.load(right, mask=here[:, None] & lane_here[None, :], other=0.0)", "tl.load(right)", torch.float32),
    ("grouped_gemm", "_grouped_kernels.py", "store without a mask", "bounds", "odd",
     "mask=row_here[:, None] & lane_here[None, :])", "mask=lane_here[None, :])", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "mirror image not transposed", "numerics", "odd",
     "mirror, tl.trans(result), mask", "mirror, result, mask", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "no mirror image", "numerics", "odd", "if down < across:", "if down > across:", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "squares of the column before", "numerics", "edge_square",
     "column * (column + 1) // 2, column", "column * (column + 1) // 2, column - column // 2", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "always the first matrix of a stack", "numerics", "odd_stack",
     "its = x + matrix * rows * depth", "its = x", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "last column left out of the sums", "numerics", "odd_wide",
     "here = k < depth - done", "here = k < depth - done - 1", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "rounded before the sum", "numerics", "odd",
     "    total += own_scale * tl.load(x + at", "    total = total.to(tl.float16).to(tl.float32) + own_scale * tl.load(x + at", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "row past the last", "bounds", "odd",
     "tl.minimum(row, rows - first - 1)[:, None]", "row[:, None]", torch.float32),
    ("newton_schulz", "_symmetric_kernels.py", "store without a mask", "bounds", "odd",
     "mask=lane_here[:, None] & row_here[None, :])", "mask=row_here[None, :])", torch.float32),
    ("newton_schulz", "newton_schulz.py", "last iteration left out", "numerics", "odd",
     "for iteration in range(iterations):", "for iteration in range(iterations - 1):", torch.float32),
    ("adamw", "adamw.py", "eps on the wrong side", "numerics", "odd_large_eps",
     "tl.div_rn(tl.sqrt_rn(v), correction) + eps", "tl.div_rn(tl.sqrt_rn(v) + eps, correction)", torch.float32),
    ("adamw", "adamw.py", "second moment without its square", "numerics", "odd",
     "one_minus_beta2 * g * g", "one_minus_beta2 * g", torch.float32),
    ("adamw", "adamw.py", "copy of the old parameter", "numerics", "odd_before",
     "p.to(copy.dtype.element_ty)", "tl.load(parameter, mask=inside).to(copy.dtype.element_ty) * 0.5", torch.float32),
    ("adamw", "adamw.py", "store without a mask", "bounds", "odd",
     "tl.store(parameter, p, mask=inside)", "tl.store(parameter, p)", torch.float32),
    ("adamw", "adamw.py", "last element left out", "numerics", "edge",
     "scale, lane < left", "scale, lane < left - 1", torch.float32),
    ("adamw", "adamw.py", "address of the tensor before", "numerics", "odd",
     "tl.load(owner + program) * 8", "tl.maximum(tl.load(owner + program) - 1, 0) * 8", torch.float32),
    ("adamw", "adamw.py", "each program at the first chunk", "numerics", "edge",
     "(program - tl.load(row + 1)) *", "(program - program) *", torch.float32),
    ("grad_norm", "grad_norm.py", "only the last block", "numerics", "edge",
     "sums += values * values", "sums = values * values", torch.float32),
    ("grad_norm", "grad_norm.py", "last partial sum left out", "numerics", "odd",
     "mask=lane < count", "mask=lane < count - 1", torch.float32),
    ("grad_norm", "grad_norm.py", "one element too many", "bounds", "odd",
     "mask=rest < left", "mask=rest <= left", torch.float32),
    ("attention", "_attention_kernels.py", "diagonal hidden", "numerics", "odd_small",
     "visible = visible & (key[None, :] <= query[:, None])\n            scores",
     "visible = visible & (key[None, :] <= query[:, None] + 1)\n            scores", torch.float32),
    ("attention", "_attention_kernels.py", "first key of a document hidden", "numerics", "odd_small",
     "visible = key[:, None] >= start[None, :]", "visible = key[:, None] > start[None, :]", torch.float32),
    ("attention", "_attention_kernels.py", "row sums not subtracted", "numerics", "odd_small",
     "ds = p * (dp - row_delta[:, None])", "ds = p * dp", torch.float32),
    ("attention", "_attention_kernels.py", "row sums not subtracted from keys", "numerics", "odd_small",
     "ds = p * (dp - row_delta[None, :])", "ds = p * dp", torch.float32),
    ("attention", "_attention_kernels.py", "sum not rescaled between blocks", "numerics", "odd",
     "row_sum = row_sum * shrink + ", "row_sum = row_sum + ", torch.float32),
    ("attention", "_attention_kernels.py", "statistic in fp16", "numerics", "odd_small",
     f"{_LSE}, mask", f"({_LSE}).to(tl.float16).to(tl.float32), mask", torch.float32),
    ("attention", "_attention_kernels.py", "last tile of queries left out", "numerics", "odd",
     "cut = T + first * 0", "cut = T - BLOCK_M + first * 0", torch.float32),
    ("attention", "_attention_kernels.py", "key heads in turn, forward", "numerics", "odd_small",
     "(batch_head % H // group).to(tl.int64)\n    first = tile", "(batch_head % H % (H // group)).to(tl.int64)\n    first = tile", torch.float32),
    ("attention", "_attention_kernels.py", "key heads in turn, gradient of q", "numerics", "odd_small",
     "(batch_head % H // group).to(tl.int64)\n    first64", "(batch_head % H % (H // group)).to(tl.int64)\n    first64", torch.float32),
    ("attention", "_attention_kernels.py", "key heads in turn, gradients of k and v", "numerics", "odd_small",
     "query_head = head * group if GROUPED else head", "query_head = head", torch.float32),
    ("attention", "_attention_kernels.py", "last query head of a key left out", "numerics", "odd_small",
     "range(blocks * group)", "range(blocks * (group - 1))", torch.float32),
    ("attention", "_attention_kernels.py", "statistics of another query head", "numerics", "odd_small",
     "(batch * H + query_head) * T", "(batch * H + head) * T", torch.float32),
    ("attention", "_attention_kernels.py", "queries of a window not looked for", "numerics", "odd_window",
     "first + BLOCK_N - 1 + reach", "first", torch.float32),
    ("attention", "attention.py", "window ignored in the gradient of q", "numerics", "odd_window",
     "q, k, v, document_start, dout, lse, delta, dq,",
     "q, k, v, None if document_start is None else document_start * 0, dout, lse, delta, dq,", torch.float32),
    ("attention", "_attention_kernels.py", "load without a mask", "bounds", "odd_small",
     _Q_TILE.format("True"), _Q_TILE.format("False"), torch.float32),
    ("attention", "_attention_kernels.py", "store without a mask", "bounds", "odd_small",
     "inside = (rows[:, None] < T) & (column[None, :] < HEAD_DIM)",
     "inside = (rows[:, None] <= T) & (column[None, :] < HEAD_DIM)", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("fault", parameters(FAULTS))
def test_a_planted_fault_is_found(fault: Any, tmp_path: Path, examine: Callable[..., Any]) -> None:
    op, file, _, check, example, old, new, dtype = fault
    report = examine("triton_ops", op, file, old, new, check, example, dtype, tmp_path)
    assert report.failed, [finding.detail for finding in report]
    assert not any(finding.detail.startswith("raised") for finding in report), report


@pytest.mark.prove
@pytest.mark.parametrize(
    ("op", "check"), [("rms_norm", "bounds"), ("swiglu", "numerics"), ("cross_entropy", "rounded_once")]
)
def test_a_copy_without_a_fault_passes(op: str, check: str, tmp_path: Path, examine: Callable[..., Any]) -> None:
    text = "from __future__ import annotations"
    report = examine("triton_ops", op, f"{op}.py", text, text, check, "odd", BF16, tmp_path)
    assert report
    assert not report.failed, [finding.detail for finding in report]


def test_every_triton_file_has_two_faults() -> None:
    from weftrain.kernels import load_catalog

    ours = [op for op, by_source in load_catalog().items() if "triton" in by_source]
    assert len(ours) >= 13
    assert all(sum(fault[0] == op for fault in FAULTS) >= 2 for op in ours)


def test_every_fault_finds_the_text_that_it_replaces() -> None:
    from mutants import is_there

    assert [fault[5] for fault in FAULTS if not is_there("triton_ops", fault[1], fault[5])] == []
