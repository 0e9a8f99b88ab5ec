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

// tanh(x) with a relative error below 2.5e-7: near 0 an odd polynomial (a least-squares fit of ours), whose digits a quotient of exponentials would lose.
__m512 tanh512(__m512 x) {
    const __m512 magnitude = _mm512_abs_ps(x), z = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1.f);
    __m512 p = _mm512_set1_ps(0.0021429572f);
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-0.0081773931f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(0.0217007007f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-0.0539467633f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(0.1333320588f));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-0.3333333135f));
    const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(x, z), p, x);
    const __m512 e = exp512(_mm512_mul_ps(magnitude, _mm512_set1_ps(-2.f)));
    const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __mmask16 is_near = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(.625f), _CMP_LE_OQ);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_mask_sub_ps(far, negative, _mm512_setzero_ps(), far), is_near, near);
}

// The same as exponentiate of cap tanh(scale x / cap), and what is written is multiplied by the derivative 1 - tanh^2.
float exponentiate_capped(bf16* x, int64_t V, float scale, float cap, float most, bool write) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 m = first(V - j);
        const __m512 t = tanh512(_mm512_div_ps(_mm512_mul_ps(load_bf16(x + j, m), _mm512_set1_ps(scale)), _mm512_set1_ps(cap)));
        const __m512 e = _mm512_maskz_mov_ps(m, exp512(_mm512_fmsub_ps(t, _mm512_set1_ps(cap), _mm512_set1_ps(most))));
        sum = _mm512_add_ps(sum, e);
        if (write) store_bf16(x + j, _mm512_mul_ps(e, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.f))), m);
    }
    return _mm512_reduce_add_ps(sum);
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

// The fp32 sum over a row of (scale x, capped, - most): no offset of all logits costs it digits.
float sum_below(const bf16* x, int64_t V, float scale, float cap, float most) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 m = first(V - j);
        __m512 s = _mm512_mul_ps(load_bf16(x + j, m), _mm512_set1_ps(scale));
        if (cap) s = _mm512_mul_ps(tanh512(_mm512_div_ps(s, _mm512_set1_ps(cap))), _mm512_set1_ps(cap));
        sum = _mm512_mask_add_ps(sum, m, sum, _mm512_sub_ps(s, _mm512_set1_ps(most)));
    }
    return _mm512_reduce_add_ps(sum);
}

// x -> exp(scale x - most) - everywhere, under a cap times its derivative; rounded once, which is why it is a pass of its own.
void smoothed_slope(bf16* x, int64_t V, float scale, float cap, float most, float everywhere) {
    const __m512 one = _mm512_set1_ps(1.f), shift = _mm512_set1_ps(most), less = _mm512_set1_ps(everywhere);
    for (int64_t j = 0; j < V; j += 16) {
        const __mmask16 m = first(V - j);
        const __m512 s = _mm512_mul_ps(load_bf16(x + j, m), _mm512_set1_ps(scale));
        if (!cap) {
            store_bf16(x + j, _mm512_sub_ps(exp512(_mm512_sub_ps(s, shift)), less), m);
            continue;
        }
        const __m512 t = tanh512(_mm512_div_ps(s, _mm512_set1_ps(cap)));
        const __m512 slope = _mm512_sub_ps(exp512(_mm512_fmsub_ps(t, _mm512_set1_ps(cap), shift)), less);
        store_bf16(x + j, _mm512_mul_ps(slope, _mm512_fnmadd_ps(t, t, one)), m);
    }
}

}  // namespace

extern "C" {

// logits [rows, V] bf16 contiguous -> slope where `gradients`; loss and row_scale fp32 [rows]: d(loss)/d(logits) = slope * row_scale.
// cap: 0 for none. smoothing: the share of the label that all classes have in equal parts. An ignored row has loss 0 and row_scale 0; a label outside 0..V-1 has loss NaN and row_scale NaN, and is never an address.
void weftrain_softmax_loss(bf16* logits, const int64_t* labels, int64_t rows, int64_t V, float scale, float cap, int64_t ignore_index, float z_loss, float smoothing, int gradients,
                           float* loss, float* row_scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        bf16* row = logits + i * V;
        const int64_t label = labels[i];
        const bool ignored = label == ignore_index, outside = !ignored && (label < 0 || label >= V);
        const int64_t place = ignored || outside ? 0 : label;
        const auto bent = [cap](float x) { return cap ? cap * std::tanh(x / cap) : x; };
        const float most = bent(maximum(row, V, scale)), at_label = bent(value(row[place]) * scale);
        const bool write = gradients && !smoothing;
        const float total = cap ? exponentiate_capped(row, V, scale, cap, most, write) : exponentiate(row, V, scale, most, write);
        const float log_total = std::log(total), lse = most + log_total;
        const float stretch = 1 + 2 * z_loss * lse;
        const float smoothed = smoothing ? (1 - smoothing) * (most - at_label) - smoothing * (sum_below(row, V, scale, cap, most) / V) : 0;
        // Not lse - at_label, which would lose the digits that a common offset of all logits takes.
        loss[i] = ignored ? 0 : outside ? __builtin_nanf("") : smoothing ? log_total + smoothed + z_loss * lse * lse : log_total + (most - at_label) + z_loss * lse * lse;
        if (!gradients) continue;
        row_scale[i] = ignored ? 0 : outside ? __builtin_nanf("") : stretch * scale / total;
        const float derivative = cap ? 1 - at_label / cap * (at_label / cap) : 1;
        const float everywhere = smoothing / V * (total / stretch);
        const float at_place = smoothing ? std::exp(at_label - most) - (1 - smoothing) * (total / stretch) - everywhere : std::exp(at_label - most) - total / stretch;
        const __m512 replaced = _mm512_set1_ps(at_place * derivative);
        if (ignored)
            std::memset(row, 0, V * sizeof(bf16));  // whatever it held, NaN too, must move nothing
        else if (smoothing)
            smoothed_slope(row, V, scale, cap, most, everywhere);
        if (!ignored)
            store_bf16(row + place, replaced, 1);
    }
}

}  // extern "C"
