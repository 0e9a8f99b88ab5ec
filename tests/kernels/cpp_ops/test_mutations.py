"""Faults planted in the C++ kernels: compiled, loaded and found by a check, each in a library of its own.

What a reader would get wrong: `old` is text of the file. When the file changes and the text is gone, the test fails:
write the fault anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import parameters

from weftrain.kernels import OPS, Spec, load_catalog

pytestmark = pytest.mark.prove  # a compilation each
FP32, BF16 = torch.float32, torch.bfloat16

# (op, file, what, check, example, old, new, dtype)
FAULTS: list[tuple[str, str, str, str, str, str, str, torch.dtype]] = [
    ("attention", "attention.cpp", "next token visible in the forward", "numerics", "edge_above",
     "query + 1 - low, n, scale);", "query + 2 - low, n, scale);", BF16),
    ("attention", "attention.cpp", "document before visible in the backward", "numerics", "edge_documents",
     "__m512 total = _mm512_setzero_ps();", "from = 0; __m512 total = _mm512_setzero_ps();", BF16),
    ("attention", "attention.cpp", "row sums not subtracted", "numerics", "edge_above",
     "_mm512_sub_ps(_mm512_loadu_ps(grad + j), sum)", "_mm512_add_ps(_mm512_loadu_ps(grad + j), _mm512_mul_ps(sum, _mm512_setzero_ps()))", BF16),
    ("attention", "attention.cpp", "gradient of k of the last block alone", "numerics", "edge_above",
     "grad_k + low, padded_T, true)", "grad_k + low, padded_T, false)", BF16),
    ("attention", "attention.cpp", "key heads in turn, forward", "numerics", "edge_grouped_window",
     "kv = h / s.group();", "kv = h % H_kv;", BF16),
    ("attention", "attention.cpp", "key heads in turn, backward", "numerics", "edge_grouped_window",
     "h = bh % H, kv = h / group;", "h = bh % H, kv = h % H_kv;", BF16),
    ("attention", "attention.cpp", "only the last query head moves a key", "numerics", "edge_grouped_window",
     "sum[j] += x[j];", "sum[j] = x[j];", BF16),
    ("attention", "attention.cpp", "first panel of a window not visited", "numerics", "edge_grouped_window",
     "return std::clamp<int64_t>(least, 0, first_query)",
     "return std::min<int64_t>(first_query, std::max<int64_t>(least, 0) + 15)", BF16),
    ("attention", "attention.cpp", "values of other keys", "numerics", "edge_grouped_window", "values + 16 * low", "values", BF16),
    ("attention", "attention.cpp", "gradient of v at other keys", "numerics", "edge_grouped_window",
     "grad_v + low, padded_T", "grad_v, padded_T", BF16),
    ("attention", "attention.py", "window ignored in the backward", "numerics", "edge_grouped_window",
     "logsumexp, ctx.scale, start,", "logsumexp, ctx.scale, None if start is None else start * 0,", BF16),
    ("attention", "vector.h", "last key of a panel lost", "numerics", "edge_above", "if (n < N)", "if (n + 1 < N)", BF16),
    ("attention", "attention.py", "refuses nothing", "refused", "k of fewer tokens",
     "    check_attention(q, k, v, document_start, window)\n", "", BF16),
    ("linear_cross_entropy", "loss.cpp", "half of the z-loss gradient", "numerics", "odd_scaled", "1 + 2 * z_loss * lse", "1 + z_loss * lse", BF16),
    ("linear_cross_entropy", "loss.cpp", "last column left out of the sum", "numerics", "odd",
     "__m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};", "__m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}; V -= 1;", BF16),
    ("linear_cross_entropy", "loss.cpp", "ignored rows counted", "numerics", "odd", "loss[i] = ignored ? 0 :", "loss[i] =", BF16),
    ("linear_cross_entropy", "loss.cpp", "statistic in bf16", "exact_logits", "odd",
     "log_total = std::log(total)", "log_total = value(_mm256_extract_epi16(to_bf16(_mm512_set1_ps(std::log(total))), 0))", BF16),
    ("linear_cross_entropy", "loss.cpp", "softcap without its derivative", "numerics", "odd_capped",
     "_mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.f))", "_mm512_set1_ps(1.f)", BF16),
    ("linear_cross_entropy", "loss.cpp", "offset kept", "offset_logits", "odd", "log_total + (most - at_label)", "lse - at_label", BF16),
    ("linear_cross_entropy", "loss.cpp", "smoothing at the label alone", "numerics", "odd_smoothed",
     "smoothed_slope(row, V, scale, cap, most, everywhere)", "smoothed_slope(row, V, scale, cap, most, 0)", BF16),
    ("linear_cross_entropy", "linear_cross_entropy.py", "weights not in the gradient", "numerics", "odd_weighted",
     "row_scale[chunk] *= token_weights[chunk, None]", "pass", BF16),
    ("grouped_gemm", "grouped.cpp", "each group from the first row", "numerics", "odd", "start = ends[e++]", "e++", BF16),
    ("grouped_gemm", "tiles.h", "last step of the depth left out", "numerics", "odd",
     "const int64_t left = width - column;", "const int64_t left = width - column - 1;", BF16),
    ("grouped_gemm", "tiles.h", "words of a transpose exchanged", "numerics", "edge",
     "r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd)", "r[k + 8] = _mm512_shuffle_i32x4(t[k + 8], t[k], 0xdd)", BF16),
    ("grouped_gemm", "tiles.h", "the second of two rows left out", "numerics", "odd",
     "row + 2 * i + 1 < rows ?", "row + 2 * i + 1 < rows - 1 ?", BF16),
    ("grouped_gemm", "grouped.cpp", "store without a mask", "bounds", "odd", "inside = first(end - column - j);", "inside = 0xffff;", BF16),
    ("grouped_gemm", "grouped_gemm.py", "rows of no group as they were", "edges", "rows of no group",
     "found[int(ends[-1]) :] = 0", "found[int(ends[-1]) :] = 1", BF16),
    ("newton_schulz", "newton.cpp", "mirror image not transposed", "numerics", "edge_square",
     "            transpose(words);\n", "", BF16),
    ("newton_schulz", "newton.cpp", "blocks on the diagonal left out", "numerics", "odd", "row > from", "row >= from", BF16),
    ("newton_schulz", "newton.cpp", "store without a mask", "bounds", "odd", "store_bf16(p.out + at, sum, inside)", "store_bf16(p.out + at, sum)", BF16),
    ("newton_schulz", "newton_schulz.py", "coefficients exchanged", "numerics", "odd", "(a, b, c)), ctypes", "(a, c, b)), ctypes", BF16),
    ("adamw", "optimizer.cpp", "eps on the wrong side", "numerics", "odd_large_eps",
     "_mm512_fmadd_ps(root, correction, eps)", "_mm512_mul_ps(_mm512_add_ps(root, eps), correction)", FP32),
    ("adamw", "optimizer.cpp", "gradient unscaled", "numerics", "odd", "_mm512_mul_ps(load(g, i, GRAD, k), factor)", "load(g, i, GRAD, k)", FP32),
    ("adamw", "optimizer.cpp", "store without a mask", "bounds", "odd",
     "_mm512_mask_storeu_ps(p + i, k, weight)", "_mm512_storeu_ps(p + i, weight)", FP32),
    ("adamw", "optimizer.cpp", "load without a mask", "bounds", "odd", "_mm512_maskz_loadu_ps(k, m + i)", "_mm512_loadu_ps(m + i)", FP32),
    ("grad_norm", "optimizer.cpp", "one chain forgotten", "numerics", "edge", "for (const auto& lanes : sum) total", "sum[7] = _mm512_setzero_ps(); for (const auto& lanes : sum) total", FP32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (implementation,) = load_catalog()["adamw"]["cpp"]
    reason = implementation.unavailable(Spec("adamw", "optimizer", "cpu", FP32, OPS["adamw"].attributes))
    if reason:
        pytest.skip(f"cpp: {reason}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("fault", parameters(FAULTS))
def test_a_planted_fault_is_found(fault: Any, tmp_path: Path, examine: Callable[..., Any]) -> None:
    op, file, _, check, example, old, new, dtype = fault
    report = examine("cpp_ops", op, file, old, new, check, example, dtype, tmp_path)
    assert report.failed, [finding.detail for finding in report]
    if check == "numerics":
        assert not any(finding.detail.startswith("raised") for finding in report), [
            finding.detail for finding in report
        ]


def test_a_copy_without_a_fault_passes(tmp_path: Path, examine: Callable[..., Any]) -> None:
    report = examine("cpp_ops", "adamw", "optimizer.cpp", "", "", "numerics", "odd", FP32, tmp_path)
    assert report
    assert not report.failed
