// What the kernels of this folder share: sixteen fp32 lanes, bf16 conversion, exp, and a bf16 matrix product on packed operands.
// Compiled for AVX-512 with bf16 instructions only; _build.py looks at the CPU before it loads anything.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

static inline __m512 load_bf16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

static inline __m512 load_bf16(const bf16* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

static inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }  // round to nearest even; NaN stays NaN

static inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }

static inline void store_bf16(bf16* p, __m512 x, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, to_bf16(x)); }

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// exp(x) with a relative error below 2.5e-7 (over all of -87..88.7): 2^k times a degree-6 polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor, Cody and Waite reduction).
// -inf gives 0, NaN stays NaN, above 88.7 gives inf.
static inline __m512 exp512(__m512 x) {
    const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    const __m512 y = _mm512_scalef_ps(p, k);
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.f), _CMP_LT_OQ);  // also -inf, where r is NaN
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(89.f), _CMP_GT_OQ);
    return _mm512_mask_blend_ps(above, _mm512_maskz_mov_ps((__mmask16)~below, y), _mm512_set1_ps(__builtin_inff()));
}

// ---- matrix product: C [M, N] fp32 (+)= A [M, K] bf16 * B [K, N] bf16 ---------------------------------------------------------------
//
// B is packed in panels of 16 columns, and in each panel in pairs of rows: panel(n / 16)[K / 2][16][2], what vdpbf16ps takes. A panel
// holds 16 * K elements. K is even, N a multiple of 16. Rows of A are lda apart, so a pair (A[m][k], A[m][k + 1]) is one 32-bit broadcast.

template <int M, int P>
static inline void tile(const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t K, float* c, int64_t ldc, bool accumulate) {
    __m512 sum[M][P];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) sum[m][p] = accumulate ? _mm512_loadu_ps(c + m * ldc + 16 * p) : _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2) {
        __m512bh column[P];
        for (int p = 0; p < P; p++) column[p] = (__m512bh)_mm512_loadu_si512(b + p * panel + 16 * k);
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * lda + k, 4);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
            for (int p = 0; p < P; p++) sum[m][p] = _mm512_dpbf16_ps(sum[m][p], row, column[p]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) _mm512_storeu_ps(c + m * ldc + 16 * p, sum[m][p]);
}

template <int P>
static inline void stripe(int64_t M, int64_t K, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc, bool accumulate) {
    int64_t m = 0;
    for (; m + 6 <= M; m += 6) tile<6, P>(a + m * lda, lda, b, panel, K, c + m * ldc, ldc, accumulate);
    for (; m + 2 <= M; m += 2) tile<2, P>(a + m * lda, lda, b, panel, K, c + m * ldc, ldc, accumulate);
    for (; m < M; m++) tile<1, P>(a + m * lda, lda, b, panel, K, c + m * ldc, ldc, accumulate);
}

// panel: elements from one panel of b to the next (16 * the K that it was packed with, which may exceed this K).
static inline void product(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc, bool accumulate) {
    int64_t n = 0;
    for (; n + 64 <= N; n += 64) stripe<4>(M, K, a, lda, b + n / 16 * panel, panel, c + n, ldc, accumulate);
    for (; n < N; n += 16) stripe<1>(M, K, a, lda, b + n / 16 * panel, panel, c + n, ldc, accumulate);
}

// x [K, N] with rows `stride` apart -> packed, K rounded up to even and N to 16 with zeros.
static inline void pack(const bf16* x, int64_t stride, int64_t K, int64_t N, bf16* out) {
    const int64_t pairs = (K + 1) / 2;
    for (int64_t k = 0; k < pairs; k++)
        for (int64_t n = 0; n < N; n += 16) {
            const __mmask16 m = first(N - n);
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x + 2 * k * stride + n));
            const __mmask16 has_odd = 2 * k + 1 < K ? m : 0;
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_odd, x + (2 * k + 1) * stride + n));
            _mm512_storeu_si512(out + n * 2 * pairs + 32 * k, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// The same of the transpose: x [N, K] with rows `stride` apart, K even -> packed [K, N], N rounded up to 16 with zeros.
static inline void pack_transposed(const bf16* x, int64_t stride, int64_t K, int64_t N, bf16* out) {
    const int64_t padded = (N + 15) / 16 * 16;
    for (int64_t n = 0; n < padded; n++) {
        bf16* to = out + n / 16 * 16 * K + n % 16 * 2;
        if (n < N)
            for (int64_t k = 0; k < K; k += 2) std::memcpy(to + 16 * k, x + n * stride + k, 4);
        else
            for (int64_t k = 0; k < K; k += 2) std::memset(to + 16 * k, 0, 4);
    }
}
