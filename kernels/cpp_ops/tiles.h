// Matrix products of bf16 in tiles of 16 rows of 64 bytes, which are packed first:
//   A tile: 16 rows, each with the next 32 elements along D;
//   B tile: 16 pairs of steps of D, each with 16 columns: [pair][column][2], what vdpbf16ps and AMX take.
// Either is the transpose, in words of two elements, of what the other's loading gives, so one transpose serves all operands. What lies outside an operand is 0
// in its tiles, so no product has an edge. A sum over D has one order, whatever the number of threads: bits do not depend on it.
#pragma once

#include <algorithm>

#include "vector.h"

#if __has_include(<amxbf16intrin.h>)  // GCC 11, Clang 12
#define HAS_AMX 1
// Never inlined: the compiler does not know that a tile instruction reads memory, and must have written it before the call.
#define WITH_AMX __attribute__((target("amx-tile,amx-bf16"), noinline, unused))
#else
#define HAS_AMX 0
#endif

namespace {

constexpr int64_t SIDE = 16, DEPTH = 32, TILE_BYTES = 1024;  // of a tile: rows, elements of one, and bytes
constexpr int64_t ROWS_OF_A_TASK = 1024;            // for which a block of B is packed once
constexpr int64_t PACKED_BYTES = 1 << 20;           // of that block: half of a second-level cache, what A is read beside
constexpr int64_t MOST_COLUMNS = 128;
constexpr int64_t PACKED_TOGETHER = 4;              // tiles of A side by side: down a column, 16 places are half a cache line

// One operand: rows `stride` elements apart; `along`: D lies along a row, else down a column.
struct Operand {
    const bf16* first;
    int64_t stride;
    bool along;
};

inline int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

// 16 rows of 32 elements from (row, column) of a matrix of `rows` rows of `width` elements; 0 outside.
inline void lines(const Operand& x, int64_t rows, int64_t width, int64_t row, int64_t column, __m512i* out) {
    const int64_t left = width - column;
    const __mmask32 inside = left >= DEPTH ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
    for (int64_t i = 0; i < SIDE; i++) out[i] = _mm512_maskz_loadu_epi16(row + i < rows ? inside : 0, x.first + (row + i) * x.stride + column);
}

// 16 pairs of rows, each with 16 columns: word [pair][column] holds (row 2 pair, row 2 pair + 1).
inline void row_pairs(const Operand& x, int64_t rows, int64_t width, int64_t row, int64_t column, __m512i* out) {
    const __mmask16 inside = first(width - column);
    for (int64_t i = 0; i < SIDE; i++) {
        const bf16* p = x.first + (row + 2 * i) * x.stride + column;
        const __mmask16 low = row + 2 * i < rows ? inside : 0, high = row + 2 * i + 1 < rows ? inside : 0;
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, p));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, p + x.stride));
        out[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
}

// 16 x 16 words of 32 bits: pairs, then quarters, then 128-bit parts change places.
inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // r[4 g + k]: of each 128-bit part p, the words of column 4 p + k of rows 4 g..4 g + 3
    for (int k = 0; k < 4; k++) {
        t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88);
        t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xdd);
        t[k + 8] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0x88);
        t[k + 12] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0xdd);
    }
    for (int k = 0; k < 4; k++) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
        r[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
        r[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd);
    }
}

// The tile of 16 places of an operand's other side from `place`, and of 32 steps of D from `step`. Of A places are rows, of B columns.
inline void pack(const Operand& x, bool of_a, int64_t places, int64_t depth, int64_t place, int64_t step, char* to) {
    __m512i tile[SIDE];
    if (x.along)
        lines(x, places, depth, place, step, tile);  // [place][step]
    else
        row_pairs(x, depth, places, step, place, tile);  // [pair of steps][place]
    if (x.along != of_a) transpose(tile);
    for (int64_t i = 0; i < SIDE; i++) _mm512_store_si512(to + 64 * i, tile[i]);
}

// c [16 R, 32] = tiles of A times tiles of B: R rows of `tiles` A tiles, and two columns of them of B. Half a tile's rows and both columns at a time.
inline void multiply(const char* a, const char* b, int64_t tiles, int row_tiles, float* c) {
    for (int half = 0; half < 2 * row_tiles; half++) {
        __m512 sum[8][2];
        for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
        const char *left = a + half / 2 * tiles * TILE_BYTES + half % 2 * (TILE_BYTES / 2), *right = b;
        for (int64_t t = 0; t < tiles; t++, left += TILE_BYTES, right += TILE_BYTES)
            for (int64_t k = 0; k < SIDE; k++) {
                const __m512bh b0 = (__m512bh)_mm512_load_si512(right + 64 * k), b1 = (__m512bh)_mm512_load_si512(right + tiles * TILE_BYTES + 64 * k);
                for (int m = 0; m < 8; m++) {
                    int32_t pair;
                    std::memcpy(&pair, left + 64 * m + 4 * k, 4);
                    const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
                    sum[m][0] = _mm512_dpbf16_ps(sum[m][0], row, b0);
                    sum[m][1] = _mm512_dpbf16_ps(sum[m][1], row, b1);
                }
            }
        for (int m = 0; m < 8; m++)
            for (int p = 0; p < 2; p++) _mm512_store_ps(c + (8 * half + m) * 32 + 16 * p, sum[m][p]);
    }
}

#if HAS_AMX

struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

const TileConfiguration EIGHT_TILES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

WITH_AMX void configure_tiles() { _tile_loadconfig(&EIGHT_TILES); }

WITH_AMX void release_tiles() { _tile_release(); }

WITH_AMX void multiply_amx(const char* a, const char* b, int64_t tiles, int row_tiles, float* c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t next = tiles * TILE_BYTES;
    for (int64_t t = 0; t < tiles; t++, a += TILE_BYTES, b += TILE_BYTES) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + next, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (row_tiles == 2) {
            _tile_loadd(5, a + next, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    if (row_tiles == 2) {
        _tile_stored(2, c + 16 * 32, 128);
        _tile_stored(3, c + 16 * 32 + 16, 128);
    }
}

#else

inline void configure_tiles() {}
inline void release_tiles() {}
inline void multiply_amx(const char*, const char*, int64_t, int, float*) {}

#endif

inline int64_t block_columns(int64_t depth) {
    const int64_t fit = PACKED_BYTES / TILE_BYTES / std::max<int64_t>(1, divided(depth, DEPTH)) * SIDE;
    return std::clamp<int64_t>(fit / 32 * 32, 32, MOST_COLUMNS);
}

inline int64_t packed_bytes(int64_t rows, int64_t depth) { return divided(rows, SIDE) * divided(depth, DEPTH) * TILE_BYTES; }

// `several` tiles side by side from `place`, over all of D, each side's lines read while they are in the cache.
inline void pack_all(const Operand& x, bool of_a, int64_t places, int64_t depth, int64_t place, int64_t several, char* to) {
    const int64_t tiles = divided(depth, DEPTH);
    for (int64_t i = 0; i < several * tiles; i++) {
        const int64_t p = x.along ? i / tiles : i % several, t = x.along ? i % tiles : i / several;
        pack(x, of_a, places, depth, place + SIDE * p, DEPTH * t, to + (p * tiles + t) * TILE_BYTES);
    }
}

}  // namespace
