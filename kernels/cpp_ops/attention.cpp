// Causal attention, bf16 in and out, softmax in fp32. One thread works on one head at a time; nothing is added atomically.
//
// A block of queries meets the keys before its end: scores of the whole prefix lie in a scratch of BLOCK x T floats, so softmax is the
// plain two-pass one and the backward's row sums are those of the very probabilities that it multiplies with.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "vector.h"

namespace {

struct Shape {
    int64_t B, T, H, D;
};
struct View {  // [B, T, H, D], last stride 1; strides in elements
    bf16* data;
    int64_t b, t, h;
    bf16* head(int64_t batch, int64_t head) const { return data + batch * b + head * h; }
};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t block_of(int64_t T) { return T <= 1024 ? 64 : 32; }  // the scratch should stay in the second-level cache

template <class T>
struct Buffer {  // 64-byte aligned, uninitialised
    T* data;
    explicit Buffer(int64_t n) : data((T*)std::aligned_alloc(64, up(std::max<int64_t>(n, 1) * sizeof(T), 64))) {
        if (!data) std::abort();  // out of host memory inside a parallel region: nothing can be unwound
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// scores [n] of one query -> scale * score where visible, -inf elsewhere; the maximum.
float mask_and_max(float* scores, int64_t from, int64_t to, int64_t padded, float scale) {
    const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
    __m512 most = hidden;
    __mmask16 nan = 0;
    for (int64_t j = 0; j < padded; j += 16) {
        const __mmask16 visible = first(to - j) & ~first(from - j);
        const __m512 s = _mm512_mask_mul_ps(hidden, visible, _mm512_loadu_ps(scores + j), _mm512_set1_ps(scale));
        nan |= _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, s);
        _mm512_storeu_ps(scores + j, s);
    }
    return nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);  // max_ps forgets a NaN
}

// scores -> exp(scores - shift) in place; the sum.
float exponentiate(float* scores, int64_t padded, float shift) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) {
        const __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(shift)));
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(scores + j, e);
    }
    return _mm512_reduce_add_ps(sum);
}

void forward_head(const Shape& s, const bf16* q, int64_t q_t, const bf16* k, int64_t k_t, const bf16* v, int64_t v_t, const int32_t* start,
                  float scale, bf16* out, int64_t out_t, float* lse, bf16* keys, bf16* values, float* scores, bf16* probabilities, float* sums) {
    const int64_t T = s.T, D = s.D, block = block_of(T), padded_T = up(T, 16);
    pack_transposed(k, k_t, D, T, keys);
    pack(v, v_t, T, D, values);
    for (int64_t first_query = 0; first_query < T; first_query += block) {
        const int64_t rows = std::min(block, T - first_query), n = up(first_query + rows, 16);
        product(rows, n, D, q + first_query * q_t, q_t, keys, 16 * D, scores, padded_T, false);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t query = first_query + i;
            float* row = scores + i * padded_T;
            const float most = mask_and_max(row, start ? start[query] : 0, query + 1, n, scale);
            const float sum = exponentiate(row, n, most);
            lse[query] = most + __builtin_logf(sum);
            const __m512 factor = _mm512_set1_ps(1.f / sum);
            for (int64_t j = 0; j < n; j += 16) store_bf16(probabilities + i * padded_T + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), factor));
        }
        product(rows, D, std::min(n, up(T, 2)), probabilities, padded_T, values, 16 * up(T, 2), sums, D, false);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < D; d += 16) store_bf16(out + (first_query + i) * out_t + d, _mm512_loadu_ps(sums + i * D + d));
    }
}

// x [rows, D] with rows `stride` apart -> out [D, columns], zero beyond rows.
void transpose(const bf16* x, int64_t stride, int64_t rows, int64_t D, bf16* out, int64_t columns) {
    for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < columns; i++) out[d * columns + i] = i < rows ? x[i * stride + d] : 0;
}

// sums [D, padded_T] fp32 -> out [T, D] bf16 with rows `stride` apart.
void store_transposed(const float* sums, int64_t padded_T, int64_t T, int64_t D, bf16* out, int64_t stride) {
    const __m512i lane = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)padded_T));
    for (int64_t d = 0; d < D; d += 16)
        for (int64_t t = 0; t < T; t++) store_bf16(out + t * stride + d, _mm512_i32gather_ps(lane, sums + d * padded_T + t, 4));
}

// Two rows of n values -> pairs (first, second), in panels of 16 columns that are `panel` elements apart.
void store_pairs(const bf16* one, const bf16* two, int64_t n, bf16* out, int64_t panel) {
    for (int64_t j = 0; j < n; j += 16) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(one + j)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(two + j)));
        _mm512_storeu_si512(out + j / 16 * panel, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

struct Scratch {
    Buffer<bf16> keys, keys_by_row, values, probabilities, slopes, probability_pairs, slope_pairs, query_t, grad_t;
    Buffer<float> scores, grad_scores, sums, grad_k, grad_v;
    Scratch(int64_t T, int64_t D)
        : keys(up(T, 16) * D), keys_by_row(up(T, 2) * D), values(up(T, 16) * D), probabilities(64 * up(T, 16)), slopes(64 * up(T, 16)),
          probability_pairs(64 * up(T, 16)), slope_pairs(64 * up(T, 16)), query_t(64 * D), grad_t(64 * D), scores(64 * up(T, 16)),
          grad_scores(64 * up(T, 16)), sums(64 * D), grad_k(D * up(T, 16)), grad_v(D * up(T, 16)) {}
};

// One query: p = exp(scale s - lse) rounded to bf16, slope = scale p (dp - sum(p dp)) rounded to bf16; zero where hidden.
void slopes_of_row(const float* scores, const float* grad, int64_t from, int64_t to, int64_t n, float scale, float lse, bf16* p, bf16* slope) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) {
        const __mmask16 visible = first(to - j) & ~first(from - j);
        const __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(scale), _mm512_set1_ps(lse));
        store_bf16(p + j, _mm512_maskz_mov_ps(visible, exp512(s)));
        total = _mm512_mask3_fmadd_ps(load_bf16(p + j), _mm512_loadu_ps(grad + j), total, visible);
    }
    const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
    for (int64_t j = 0; j < n; j += 16) {
        const __mmask16 visible = first(to - j) & ~first(from - j);
        const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(grad + j), sum);
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(load_bf16(p + j), centred), _mm512_set1_ps(scale));
        store_bf16(slope + j, _mm512_maskz_mov_ps(visible, scaled));
    }
}

void backward_head(const Shape& s, const bf16* g, int64_t g_t, const bf16* q, int64_t q_t, const bf16* k, int64_t k_t, const bf16* v, int64_t v_t,
                   const int32_t* start, float scale, const float* lse, bf16* dq, bf16* dk, bf16* dv, int64_t out_t, Scratch& w) {
    const int64_t T = s.T, D = s.D, block = block_of(T), padded_T = up(T, 16);
    pack_transposed(k, k_t, D, T, w.keys.data);
    pack(k, k_t, T, D, w.keys_by_row.data);
    pack_transposed(v, v_t, D, T, w.values.data);
    std::fill(w.grad_k.data, w.grad_k.data + D * padded_T, 0.f);
    std::fill(w.grad_v.data, w.grad_v.data + D * padded_T, 0.f);
    for (int64_t first_query = 0; first_query < T; first_query += block) {
        const int64_t rows = std::min(block, T - first_query), n = up(first_query + rows, 16), even = up(rows, 2);
        product(rows, n, D, q + first_query * q_t, q_t, w.keys.data, 16 * D, w.scores.data, padded_T, false);
        product(rows, n, D, g + first_query * g_t, g_t, w.values.data, 16 * D, w.grad_scores.data, padded_T, false);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = i * padded_T, query = first_query + i;
            slopes_of_row(w.scores.data + at, w.grad_scores.data + at, start ? start[query] : 0, query + 1, n, scale, lse[query],
                          w.probabilities.data + at, w.slopes.data + at);
        }
        if (even > rows) {
            std::fill_n(w.probabilities.data + rows * padded_T, n, bf16(0));
            std::fill_n(w.slopes.data + rows * padded_T, n, bf16(0));
        }
        const int64_t panel = 16 * even;
        for (int64_t i = 0; i < even; i += 2) {
            store_pairs(w.probabilities.data + i * padded_T, w.probabilities.data + (i + 1) * padded_T, n, w.probability_pairs.data + 16 * i, panel);
            store_pairs(w.slopes.data + i * padded_T, w.slopes.data + (i + 1) * padded_T, n, w.slope_pairs.data + 16 * i, panel);
        }
        product(rows, D, std::min(n, up(T, 2)), w.slopes.data, padded_T, w.keys_by_row.data, 16 * up(T, 2), w.sums.data, D, false);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < D; d += 16) store_bf16(dq + (first_query + i) * out_t + d, _mm512_loadu_ps(w.sums.data + i * D + d));
        transpose(q + first_query * q_t, q_t, rows, D, w.query_t.data, even);
        transpose(g + first_query * g_t, g_t, rows, D, w.grad_t.data, even);
        product(D, n, even, w.query_t.data, even, w.slope_pairs.data, panel, w.grad_k.data, padded_T, true);
        product(D, n, even, w.grad_t.data, even, w.probability_pairs.data, panel, w.grad_v.data, padded_T, true);
    }
    store_transposed(w.grad_k.data, padded_T, T, D, dk, out_t);
    store_transposed(w.grad_v.data, padded_T, T, D, dv, out_t);
}

}  // namespace

extern "C" {

// strides: of q, k, v, each (b, t, h). out [B, T, H, D] contiguous, lse fp32 [B, H, T]. start int32 [B, T] or null. D % 32 == 0.
void weftrain_attention_forward(bf16* q, bf16* k, bf16* v, const int64_t* strides, const int32_t* start, bf16* out, float* lse, int64_t B, int64_t T,
                                int64_t H, int64_t D, float scale, int threads) {
    const Shape s{B, T, H, D};
    const View Q{q, strides[0], strides[1], strides[2]}, K{k, strides[3], strides[4], strides[5]}, V{v, strides[6], strides[7], strides[8]};
#pragma omp parallel num_threads(threads)
    {
        const int64_t padded_T = up(T, 16);
        Buffer<bf16> keys(padded_T * D), values(up(T, 2) * D), probabilities(64 * padded_T);
        Buffer<float> scores(64 * padded_T), sums(64 * D);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * H; i++) {
            const int64_t b = i / H, h = i % H;
            forward_head(s, Q.head(b, h), Q.t, K.head(b, h), K.t, V.head(b, h), V.t, start ? start + b * T : nullptr, scale,
                         out + b * T * H * D + h * D, H * D, lse + i * T, keys.data, values.data, scores.data, probabilities.data, sums.data);
        }
    }
}

// strides: of grad, q, k, v. dq, dk, dv [B, T, H, D] contiguous.
void weftrain_attention_backward(bf16* grad, bf16* q, bf16* k, bf16* v, const int64_t* strides, const int32_t* start, const float* lse, bf16* dq, bf16* dk,
                                 bf16* dv, int64_t B, int64_t T, int64_t H, int64_t D, float scale, int threads) {
    const Shape s{B, T, H, D};
    const View G{grad, strides[0], strides[1], strides[2]}, Q{q, strides[3], strides[4], strides[5]}, K{k, strides[6], strides[7], strides[8]},
        V{v, strides[9], strides[10], strides[11]};
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(T, D);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * H; i++) {
            const int64_t b = i / H, h = i % H, at = b * T * H * D + h * D;
            backward_head(s, G.head(b, h), G.t, Q.head(b, h), Q.t, K.head(b, h), K.t, V.head(b, h), V.t, start ? start + b * T : nullptr, scale,
                          lse + i * T, dq + at, dk + at, dv + at, H * D, scratch);
        }
    }
}

}  // extern "C"
