// The softmax part of linear_cross_entropy: a chunk of bf16 logits becomes its own gradient, in place, a row at a time.
//
// The gradient (softmax (1 + 2 z lse) - onehot) * logits_scale is left as exp(scaled - max) with one entry replaced, times a factor a
// row that the caller puts into the small operands: bf16 then rounds numbers of the size of 1, and no second pass divides.
#include <cmath>

#include "vector.h"

namespace {

float value(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

float maximum(const bf16* x, int64_t V, float scale) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    __mmask16 nan = 0;
    for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 m = first(V - j);
        const __m512 s = _mm512_mul_ps(load_bf16(x + j, m), _mm512_set1_ps(scale));
        nan |= _mm512_mask_cmp_ps_mask(m, s, s, _CMP_UNORD_Q);
        most = _mm512_mask_max_ps(most, m, most, s);
    }
    return nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
}

// x -> exp(scale x - most), rounded; the fp32 sum of what was not rounded.
float exponentiate(bf16* x, int64_t V, float scale, float most, bool write) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 m = first(V - j);
        const __m512 e = _mm512_maskz_mov_ps(m, exp512(_mm512_fmsub_ps(load_bf16(x + j, m), _mm512_set1_ps(scale), _mm512_set1_ps(most))));
        sum[j / 16 % 2] = _mm512_add_ps(sum[j / 16 % 2], e);
        if (write) store_bf16(x + j, e, m);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

}  // namespace

extern "C" {

// logits [rows, V] bf16 contiguous -> slope where `gradients`; loss and row_scale fp32 [rows]: d(loss)/d(logits) = slope * row_scale.
// An ignored row has loss 0 and row_scale 0; a label outside 0..V-1 has loss NaN and row_scale NaN, and is never an address.
void weftrain_softmax_loss(bf16* logits, const int64_t* labels, int64_t rows, int64_t V, float scale, int64_t ignore_index, float z_loss, int gradients,
                           float* loss, float* row_scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        bf16* row = logits + i * V;
        const int64_t label = labels[i];
        const bool ignored = label == ignore_index, outside = !ignored && (label < 0 || label >= V);
        const int64_t place = ignored || outside ? 0 : label;
        const float most = maximum(row, V, scale), at_label = value(row[place]) * scale;
        const float total = exponentiate(row, V, scale, most, gradients), log_total = std::log(total), lse = most + log_total;
        const float stretch = 1 + 2 * z_loss * lse;
        // Not lse - at_label, which would lose the digits that a common offset of all logits takes.
        loss[i] = ignored ? 0 : outside ? __builtin_nanf("") : log_total + (most - at_label) + z_loss * lse * lse;
        if (!gradients) continue;
        row_scale[i] = ignored ? 0 : outside ? __builtin_nanf("") : stretch * scale / total;
        const __m512 replaced = _mm512_set1_ps(std::exp(at_label - most) - total / stretch);
        if (ignored)
            std::memset(row, 0, V * sizeof(bf16));  // whatever it held, NaN too, must move nothing
        else
            store_bf16(row + place, replaced, 1);
    }
}

}  // extern "C"
