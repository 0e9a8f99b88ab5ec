// Causal attention, bf16 in and out, softmax in fp32. One thread works on one head at a time; nothing is added atomically.
//
// Consecutive query heads may share a key head. The forward packs its keys and values once for all that a thread takes; the backward adds
// up their dk and dv in a fixed order. `start` is the first key that a query sees, of its document and its window; keys that no query of a
// block sees are not visited.
//
// A block of queries meets the keys before its end: scores of the whole prefix lie in a scratch of BLOCK x T floats, so softmax is the
// plain two-pass one and the backward's row sums are those of the very probabilities that it multiplies with.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "vector.h"

namespace {

struct Shape {
    int64_t B, T, H, D, H_kv, block;  // block: queries at a time
    int64_t group() const { return H_kv ? H / H_kv : 0; }
};
struct View {  // [B, T, H, D], last stride 1; strides in elements
    bf16* data;
    int64_t b, t, h;
    bf16* head(int64_t batch, int64_t head) const { return data + batch * b + head * h; }
};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// reach: how many keys a query sees at most. The scratch should stay in the second-level cache.
int64_t block_of(int64_t reach) { return reach <= 1024 ? 64 : 32; }

// From where on a block of queries meets keys, in whole panels.
int64_t low_of(const int32_t* start, int64_t first_query, int64_t rows) {
    if (!start) return 0;
    const int64_t least = *std::min_element(start + first_query, start + first_query + rows);
    return std::clamp<int64_t>(least, 0, first_query) / 16 * 16;
}

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

void forward_head(const Shape& s, const bf16* q, int64_t q_t, const bf16* keys, const bf16* values, const int32_t* start, float scale, bf16* out,
                  int64_t out_t, float* lse, float* scores, bf16* probabilities, float* sums) {
    const int64_t T = s.T, D = s.D;
    for (int64_t first_query = 0; first_query < T; first_query += s.block) {
        const int64_t rows = std::min(s.block, T - first_query), end = up(first_query + rows, 16), low = low_of(start, first_query, rows);
        const int64_t n = end - low;
        product(rows, n, D, q + first_query * q_t, q_t, keys + low * D, 16 * D, scores, n, false);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t query = first_query + i;
            float* row = scores + i * n;
            const float most = mask_and_max(row, start ? start[query] - low : 0, query + 1 - low, n, scale);
            const float sum = exponentiate(row, n, most);
            lse[query] = most + __builtin_logf(sum);
            const __m512 factor = _mm512_set1_ps(1.f / sum);
            for (int64_t j = 0; j < n; j += 16) store_bf16(probabilities + i * n + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), factor));
        }
        product(rows, D, std::min(end, up(T, 2)) - low, probabilities, n, values + 16 * low, 16 * up(T, 2), sums, D, false);
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
    Buffer<float> scores, grad_scores, sums;
    Scratch(int64_t T, int64_t D)
        : keys(up(T, 16) * D), keys_by_row(up(T, 2) * D), values(up(T, 16) * D), probabilities(64 * up(T, 16)), slopes(64 * up(T, 16)),
          probability_pairs(64 * up(T, 16)), slope_pairs(64 * up(T, 16)), query_t(64 * D), grad_t(64 * D), scores(64 * up(T, 16)),
          grad_scores(64 * up(T, 16)), sums(64 * D) {}
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

// One query head, with its key head packed in w: its dq, and what it adds to grad_k and grad_v [D, padded T].
void backward_head(const Shape& s, const bf16* g, int64_t g_t, const bf16* q, int64_t q_t, const int32_t* start, float scale, const float* lse,
                   bf16* dq, int64_t out_t, float* grad_k, float* grad_v, Scratch& w) {
    const int64_t T = s.T, D = s.D, padded_T = up(T, 16);
    for (int64_t first_query = 0; first_query < T; first_query += s.block) {
        const int64_t rows = std::min(s.block, T - first_query), end = up(first_query + rows, 16), low = low_of(start, first_query, rows);
        const int64_t n = end - low, even = up(rows, 2);
        product(rows, n, D, q + first_query * q_t, q_t, w.keys.data + low * D, 16 * D, w.scores.data, n, false);
        product(rows, n, D, g + first_query * g_t, g_t, w.values.data + low * D, 16 * D, w.grad_scores.data, n, false);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = i * n, query = first_query + i;
            slopes_of_row(w.scores.data + at, w.grad_scores.data + at, start ? start[query] - low : 0, query + 1 - low, n, scale, lse[query],
                          w.probabilities.data + at, w.slopes.data + at);
        }
        if (even > rows) {
            std::fill_n(w.probabilities.data + rows * n, n, bf16(0));
            std::fill_n(w.slopes.data + rows * n, n, bf16(0));
        }
        const int64_t panel = 16 * even;
        for (int64_t i = 0; i < even; i += 2) {
            store_pairs(w.probabilities.data + i * n, w.probabilities.data + (i + 1) * n, n, w.probability_pairs.data + 16 * i, panel);
            store_pairs(w.slopes.data + i * n, w.slopes.data + (i + 1) * n, n, w.slope_pairs.data + 16 * i, panel);
        }
        product(rows, D, std::min(end, up(T, 2)) - low, w.slopes.data, n, w.keys_by_row.data + 16 * low, 16 * up(T, 2), w.sums.data, D, false);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < D; d += 16) store_bf16(dq + (first_query + i) * out_t + d, _mm512_loadu_ps(w.sums.data + i * D + d));
        transpose(q + first_query * q_t, q_t, rows, D, w.query_t.data, even);
        transpose(g + first_query * g_t, g_t, rows, D, w.grad_t.data, even);
        product(D, n, even, w.query_t.data, even, w.slope_pairs.data, panel, grad_k + low, padded_T, true);
        product(D, n, even, w.grad_t.data, even, w.probability_pairs.data, panel, grad_v + low, padded_T, true);
    }
}

void add(const float* x, int64_t n, float* sum) {
    for (int64_t j = 0; j < n; j++) sum[j] += x[j];
}

}  // namespace

extern "C" {

// strides: of q, k, v, each (b, t, h). out [B, T, H, D] contiguous, lse fp32 [B, H, T]. start int32 [B, T] or null. reach: how many keys a
// query sees at most. D % 16 == 0, H % H_kv == 0.
void weftrain_attention_forward(bf16* q, bf16* k, bf16* v, const int64_t* strides, const int32_t* start, bf16* out, float* lse, int64_t B, int64_t T,
                                int64_t H, int64_t D, int64_t H_kv, int64_t reach, float scale, int threads) {
    const Shape s{B, T, H, D, H_kv, block_of(reach)};
    const View Q{q, strides[0], strides[1], strides[2]}, K{k, strides[3], strides[4], strides[5]}, V{v, strides[6], strides[7], strides[8]};
#pragma omp parallel num_threads(threads)
    {
        const int64_t padded_T = up(T, 16);
        Buffer<bf16> keys(padded_T * D), values(up(T, 2) * D), probabilities(64 * padded_T);
        Buffer<float> scores(64 * padded_T), sums(64 * D);
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * H; i++) {
            const int64_t b = i / H, h = i % H, kv = h / s.group();
            if (packed != b * H_kv + kv) {
                pack_transposed(K.head(b, kv), K.t, D, T, keys.data);
                pack(V.head(b, kv), V.t, T, D, values.data);
                packed = b * H_kv + kv;
            }
            forward_head(s, Q.head(b, h), Q.t, keys.data, values.data, start ? start + b * T : nullptr, scale, out + b * T * H * D + h * D, H * D,
                         lse + i * T, scores.data, probabilities.data, sums.data);
        }
    }
}

// strides: of grad, q, k, v. dq [B, T, H, D], dk and dv [B, T, H_kv, D] contiguous.
void weftrain_attention_backward(bf16* grad, bf16* q, bf16* k, bf16* v, const int64_t* strides, const int32_t* start, const float* lse, bf16* dq, bf16* dk,
                                 bf16* dv, int64_t B, int64_t T, int64_t H, int64_t D, int64_t H_kv, int64_t reach, float scale, int threads) {
    const Shape s{B, T, H, D, H_kv, block_of(reach)};
    const View G{grad, strides[0], strides[1], strides[2]}, Q{q, strides[3], strides[4], strides[5]}, K{k, strides[6], strides[7], strides[8]},
        V{v, strides[9], strides[10], strides[11]};
    const int64_t padded_T = up(T, 16), one = D * padded_T, group = std::max<int64_t>(s.group(), 1), key_heads = B * H_kv;
    // A thread takes all query heads of a key head where all threads get about as much, else one query head. Either way the dk and dv of a
    // query head are summed by themselves, and then over the heads in their order: the same bits.
    const bool together = group == 1 || key_heads % threads == 0 || key_heads >= 4 * threads;
    const int64_t at_once = together ? group : 1;
    Buffer<float> apart(together ? 0 : B * H * 2 * one);  // [B, H, (dk, dv), D, padded T]
    const auto store = [&](const float* sum, int64_t i, bf16* out) {
        store_transposed(sum, padded_T, T, D, out + i / H_kv * T * H_kv * D + i % H_kv * D, H_kv * D);
    };
#pragma omp parallel num_threads(threads)
    {
        Scratch w(T, D);
        Buffer<float> sum(2 * one), next(together && group > 1 ? 2 * one : 0);  // dk and dv, [D, padded T]
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * H / at_once; i++) {
            for (int64_t bh = i * at_once; bh < (i + 1) * at_once; bh++) {
                const int64_t b = bh / H, h = bh % H, kv = h / group;
                if (packed != bh / group) {
                    pack_transposed(K.head(b, kv), K.t, D, T, w.keys.data);
                    pack(K.head(b, kv), K.t, T, D, w.keys_by_row.data);
                    pack_transposed(V.head(b, kv), V.t, D, T, w.values.data);
                    packed = bh / group;
                }
                float* grads = !together ? apart.data + bh * 2 * one : h % group ? next.data : sum.data;
                std::fill_n(grads, 2 * one, 0.f);
                backward_head(s, G.head(b, h), G.t, Q.head(b, h), Q.t, start ? start + b * T : nullptr, scale, lse + bh * T,
                              dq + b * T * H * D + h * D, H * D, grads, grads + one, w);
                if (grads == next.data) add(next.data, 2 * one, sum.data);
            }
            if (together) {
                store(sum.data, i, dk);
                store(sum.data + one, i, dv);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (together ? 0 : 2 * key_heads); i++) {  // dk and dv of each key head
            float* first = apart.data + (i / 2 * group * 2 + i % 2) * one;
            for (int64_t h = 1; h < group; h++) add(first + h * 2 * one, one, first);
            store(first, i / 2, i % 2 ? dv : dk);
        }
    }
}

}  // extern "C"
