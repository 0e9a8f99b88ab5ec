// Newton-Schulz iterations of a stack of bf16 matrices X [n, m], n <= m: G = X X^T, P = c G G + b G, X = P X + a X. G and P are symmetric: of each 32 x 32 block on
// and above the diagonal the sums are computed, and above it they are stored twice, the second time transposed.
#include <utility>
#include <vector>

#include <omp.h>

#include "tiles.h"

namespace {

// out [rows, columns] = scale A B + own_scale own, rounded once. symmetric: rows are columns, and out is its own transpose.
struct Product {
    Operand a, b;
    int64_t rows, depth, columns;
    bool symmetric;
    float scale, own_scale;
    const bf16* own;  // like out, which it may be; or null
    bf16* out;
    char* packed;  // A in tiles
};

// The 32 x 32 sums c at (row, column), of which `rows` lines and the columns before `end` are there.
void finish(const Product& p, float* c, int64_t row, int64_t column, int64_t rows, int64_t end) {
    const __m512 scale = _mm512_set1_ps(p.scale), own_scale = _mm512_set1_ps(p.own_scale);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < 32; j += SIDE) {
            const __mmask16 inside = first(end - column - j);
            const int64_t at = (row + i) * p.columns + column + j;
            __m512 sum = _mm512_mul_ps(scale, _mm512_load_ps(c + 32 * i + j));
            if (p.own) sum = _mm512_fmadd_ps(own_scale, load_bf16(p.own + at, inside), sum);
            store_bf16(p.out + at, sum, inside);
            _mm512_store_ps(c + 32 * i + j, sum);
        }
    if (!p.symmetric || row >= column) return;
    for (int64_t i = 0; i < rows; i += SIDE)
        for (int64_t j = 0; j < 32; j += SIDE) {
            __m512i words[SIDE];
            for (int64_t k = 0; k < SIDE; k++) words[k] = _mm512_load_si512(c + 32 * (i + k) + j);
            transpose(words);
            const __mmask16 inside = first(rows - i);
            for (int64_t k = 0; k < SIDE && column + j + k < end; k++)
                store_bf16(p.out + (column + j + k) * p.columns + row + i, _mm512_castsi512_ps(words[k]), inside);
        }
}

// The columns from `column` on that one packed block of B serves, over all rows: no other task reads or writes them of `own` and B, which may be `out`.
void run(const Product& p, int64_t column, bool amx, char* packed) {
    const int64_t tiles = divided(p.depth, DEPTH), end = std::min(p.columns, column + block_columns(p.depth)), panels = divided(end - column, 32) * 2;
    pack_all(p.b, false, p.columns, p.depth, column, panels, packed);
    alignas(64) float c[32 * 32];
    const int64_t last = p.symmetric ? end : p.rows;
    for (int64_t row = 0; row < last; row += 32)
        for (int64_t panel = 0; panel < panels; panel += 2) {
            const int64_t from = column + SIDE * panel, lines = std::min<int64_t>(32, p.rows - row);
            if (p.symmetric && row > from) continue;
            (amx ? multiply_amx : multiply)(p.packed + packed_bytes(row, p.depth), packed + panel * tiles * TILE_BYTES, tiles, lines > SIDE ? 2 : 1, c);
            finish(p, c, row, from, lines, end);
        }
}

struct Task {
    const Product* product;
    int64_t place;
};

void multiply_all(std::vector<Product>& products, char* packed_a, char* packed_b, int64_t bytes_of_thread, bool amx, int threads) {
    std::vector<Task> tasks, packing;
    for (Product& p : products) {
        p.packed = packed_a;
        packed_a += packed_bytes(p.rows, p.depth);
        for (int64_t row = 0; row < p.rows; row += SIDE * PACKED_TOGETHER) packing.push_back({&p, row});
        const int64_t width = block_columns(p.depth);
        for (int64_t column = (p.columns - 1) / width * width; column >= 0; column -= width) tasks.push_back({&p, column});  // the longest of a triangle first
    }
#pragma omp parallel num_threads(threads)
    {
        if (amx) configure_tiles();
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < packing.size(); i++) {
            const Product& p = *packing[i].product;
            const int64_t row = packing[i].place, several = std::min(PACKED_TOGETHER, divided(p.rows - row, SIDE));
            pack_all(p.a, true, p.rows, p.depth, row, several, p.packed + packed_bytes(row, p.depth));
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) run(*tasks[i].product, tasks[i].place, amx, packed_b + omp_get_thread_num() * bytes_of_thread);
        if (amx) release_tiles();
    }
}

}  // namespace

extern "C" {

// found: bytes of one matrix's packed A, bytes of a thread's packed block of B, and how many threads one matrix can occupy.
void weftrain_newton_schulz_needs(int64_t n, int64_t m, int64_t* found) {
    found[0] = packed_bytes(n, m);
    found[1] = found[2] = 0;
    for (auto [depth, columns] : {std::pair{m, n}, {n, n}, {n, m}}) {
        const int64_t width = std::min(block_columns(depth), divided(columns, 32) * 32);
        found[1] = std::max(found[1], packed_bytes(width, depth));
        found[2] = std::max(found[2], divided(columns, width));
    }
}

// x and out [S, n, m], gram and polynomial [S, n, n], all contiguous; packed_a and packed_b on a multiple of 64 bytes, packed_a for S matrices, packed_b with
// `bytes_of_thread` for each thread.
void weftrain_newton_schulz(int amx, const bf16* x, bf16* out, bf16* gram, bf16* polynomial, int64_t S, int64_t n, int64_t m, float a, float b, float c, int64_t iterations, char* packed_a,
                            char* packed_b, int64_t bytes_of_thread, int threads) {
    for (int64_t iteration = 0; iteration < iterations; iteration++, x = out)
        for (int kind = 0; kind < 3; kind++) {
            std::vector<Product> products;
            for (int64_t s = 0; s < S; s++) {
                const bf16* from = x + s * n * m;
                bf16 *g = gram + s * n * n, *p = polynomial + s * n * n;
                const Product kinds[3] = {
                    {{from, m, true}, {from, m, true}, n, m, n, true, 1, 0, nullptr, g, nullptr},
                    {{g, n, true}, {g, n, true}, n, n, n, true, c, b, g, p, nullptr},
                    {{p, n, true}, {from, m, false}, n, n, m, false, 1, a, from, out + s * n * m, nullptr},
                };
                products.push_back(kinds[kind]);
            }
            multiply_all(products, packed_a, packed_b, bytes_of_thread, amx, threads);
        }
}

}  // extern "C"
