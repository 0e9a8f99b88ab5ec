// adamw and grad_norm: each tensor read once, in blocks that do not depend on the number of threads.
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace {

enum Dtype { FLOAT32, BFLOAT16 };

constexpr int64_t BLOCK = 1 << 14;  // elements: 64 KiB of fp32, a few of which fit the second-level cache

struct Constants {
    float one_minus_beta1, beta2, one_minus_beta2, eps, correction, rate, decay;
};

inline __m512 load(const void* p, int64_t i, Dtype dtype, __mmask16 m) {
    return dtype == FLOAT32 ? _mm512_maskz_loadu_ps(m, (const float*)p + i) : load_bf16((const bf16*)p + i, m);
}

template <Dtype GRAD, bool COPY, bool EPS_AFTER>
void update(float* p, const void* g, float* m, float* v, bf16* copy, int64_t begin, int64_t end, float scale, const Constants& c) {
    const __m512 b1 = _mm512_set1_ps(c.one_minus_beta1), b2 = _mm512_set1_ps(c.beta2), b2_rest = _mm512_set1_ps(c.one_minus_beta2);
    const __m512 eps = _mm512_set1_ps(c.eps), correction = _mm512_set1_ps(c.correction), rate = _mm512_set1_ps(c.rate);
    const __m512 decay = _mm512_set1_ps(c.decay), factor = _mm512_set1_ps(scale);
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 k = first(end - i);
        const __m512 gradient = _mm512_mul_ps(load(g, i, GRAD, k), factor);
        __m512 momentum = _mm512_maskz_loadu_ps(k, m + i), variance = _mm512_maskz_loadu_ps(k, v + i), weight = _mm512_maskz_loadu_ps(k, p + i);
        momentum = _mm512_fmadd_ps(b1, _mm512_sub_ps(gradient, momentum), momentum);
        variance = _mm512_fmadd_ps(_mm512_mul_ps(b2_rest, gradient), gradient, _mm512_mul_ps(variance, b2));
        const __m512 root = _mm512_sqrt_ps(variance);
        if (EPS_AFTER) {  // correction = 1 / sqrt(1 - b2^t), rate = lr / (1 - b1^t), decay = 1 - lr wd
            const __m512 denominator = _mm512_fmadd_ps(root, correction, eps);
            weight = _mm512_fnmadd_ps(rate, _mm512_div_ps(momentum, denominator), _mm512_mul_ps(weight, decay));
        } else {  // correction = sqrt(1 - b2^t) / (1 - b1^t), rate = lr, decay = wd
            const __m512 step = _mm512_mul_ps(_mm512_div_ps(momentum, _mm512_add_ps(root, eps)), correction);
            weight = _mm512_fnmadd_ps(rate, _mm512_fmadd_ps(decay, weight, step), weight);
        }
        _mm512_mask_storeu_ps(m + i, k, momentum);
        _mm512_mask_storeu_ps(v + i, k, variance);
        _mm512_mask_storeu_ps(p + i, k, weight);
        if (COPY) store_bf16(copy + i, weight, k);
    }
}

using Update = void (*)(float*, const void*, float*, float*, bf16*, int64_t, int64_t, float, const Constants&);

template <Dtype GRAD>
Update pick(bool copy, bool eps_after) {
    if (copy) return eps_after ? update<GRAD, true, true> : update<GRAD, true, false>;
    return eps_after ? update<GRAD, false, true> : update<GRAD, false, false>;
}

// Sum of squares of one block, in 128 fp32 lanes of at most BLOCK / 128 terms each: eight chains hide the latency of an addition.
double squares(const void* x, int64_t begin, int64_t end, Dtype dtype) {
    __m512 sum[8];
    for (auto& lanes : sum) lanes = _mm512_setzero_ps();
    for (int64_t i = begin; i < end; i += 128)
        for (int64_t chain = 0; chain < 8; chain++) {
            const __m512 value = load(x, i + 16 * chain, dtype, first(end - i - 16 * chain));
            sum[chain] = _mm512_fmadd_ps(value, value, sum[chain]);
        }
    double total = 0;
    for (const auto& lanes : sum) total += _mm512_reduce_add_ps(lanes);
    return total;
}

}  // namespace

extern "C" {

// constants: as in struct Constants. grad_dtype 0: fp32, 1: bf16. copy: bf16 or null. scale: the 0-dim clip coefficient.
void weftrain_adamw(float* p, const void* g, int grad_dtype, float* m, float* v, bf16* copy, int64_t n, const float* scale, const float* constants,
                    int eps_after, int threads) {
    const Constants c{constants[0], constants[1], constants[2], constants[3], constants[4], constants[5], constants[6]};
    const Update step = grad_dtype == FLOAT32 ? pick<FLOAT32>(copy, eps_after) : pick<BFLOAT16>(copy, eps_after);
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) step(p, g, m, v, copy, block * BLOCK, std::min(n, (block + 1) * BLOCK), *scale, c);
}

// Sum of squares; block sums are added in double and in order, so the bits do not depend on the number of threads. partial: [blocks].
double weftrain_sum_of_squares(const void* x, int dtype, int64_t n, double* partial, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) partial[block] = squares(x, block * BLOCK, std::min(n, (block + 1) * BLOCK), Dtype(dtype));
    double sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += partial[block];
    return sum;
}

int64_t weftrain_block() { return BLOCK; }

}  // extern "C"
