// Products of ragged groups: each group is a matrix product of its own, out [R, C] = A [R, D] B [D, C], and all groups' blocks are one list of tasks.
#include <vector>

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace {

struct Group {
    Operand a, b;
    int64_t rows, depth, columns;
    bf16* out;  // its rows lie `columns` apart
    char* packed;  // A in tiles [rows / 16][depth / tile]
};

struct Task {
    const Group* group;
    int64_t row, column, columns;
};

void store(const float* c, bf16* out, int64_t columns, int64_t row, int64_t column, int64_t rows, int64_t end) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < 32; j += SIDE) {
            const __mmask16 inside = first(end - column - j);
            store_bf16(out + (row + i) * columns + column + j, _mm512_load_ps(c + 32 * i + j), inside);
        }
}

void run(const Task& task, bool amx, char* packed) {
    const Group& g = *task.group;
    const int64_t tiles = divided(g.depth, DEPTH), end = std::min(g.columns, task.column + task.columns);
    const int64_t panels = divided(end - task.column, 32) * 2;  // an even number, the last of which may be zeros
    pack_all(g.b, false, g.columns, g.depth, task.column, panels, packed);
    alignas(64) float c[32 * 32];
    const int64_t last = std::min(g.rows, task.row + ROWS_OF_A_TASK);
    for (int64_t row = task.row; row < last; row += 32)
        for (int64_t p = 0; p < panels; p += 2) {
            const char *a = g.packed + packed_bytes(row, g.depth), *b = packed + p * tiles * TILE_BYTES;
            (amx ? multiply_amx : multiply)(a, b, tiles, last - row > SIDE ? 2 : 1, c);
            store(c, g.out, g.columns, row, task.column + SIDE * p, std::min<int64_t>(32, last - row), end);
        }
}

// What is multiplied for each group: rows of x by its matrix, or where `outer` columns of x (there dy) by rows of `other` (there x).
std::vector<Group> groups_of(bool outer, bool transposed, const bf16* x, const bf16* other, bf16* out, const int32_t* ends, int64_t E, int64_t D, int64_t C) {
    std::vector<Group> groups(E);
    for (int64_t e = 0, start = 0; e < E; start = ends[e++]) {
        const int64_t rows = ends[e] - start;
        if (outer)  // x [N, D], other [N, C] -> out [E, D, C]
            groups[e] = {{x + start * D, D, false}, {other + start * C, C, false}, D, rows, C, out + e * D * C, nullptr};
        else  // x [N, D], other [E, C, D] or [E, D, C] -> out [N, C]
            groups[e] = {{x + start * D, D, true}, {other + e * D * C, transposed ? D : C, transposed}, rows, D, C, out + start * C, nullptr};
    }
    return groups;
}

}  // namespace

extern "C" {

// Whether this process may use the CPU's matrix tiles. Linux gives a process their registers when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
int weftrain_has_tiles() {
#if HAS_AMX
    return __builtin_cpu_supports("avx512f") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

// found: bytes of all packed A, and of a thread's packed block of B.
void weftrain_grouped_bytes(int outer, const int32_t* ends, int64_t E, int64_t D, int64_t C, int64_t* found) {
    found[0] = found[1] = 0;
    for (const Group& g : groups_of(outer, false, nullptr, nullptr, nullptr, ends, E, D, C)) {
        found[0] += packed_bytes(g.rows, g.depth);
        found[1] = std::max(found[1], packed_bytes(std::min(block_columns(g.depth), divided(g.columns, 32) * 32), g.depth));
    }
}

// All contiguous; packed_a and packed_b on a multiple of 64 bytes, packed_b with `bytes_of_thread` for each thread.
void weftrain_grouped(int amx, int outer, int transposed, const bf16* x, const bf16* other, bf16* out, const int32_t* ends, int64_t E, int64_t D, int64_t C, char* packed_a, char* packed_b,
                      int64_t bytes_of_thread, int threads) {
    auto groups = groups_of(outer, transposed, x, other, out, ends, E, D, C);
    std::vector<Task> tasks, packing;
    for (Group& g : groups) {
        g.packed = packed_a;
        packed_a += packed_bytes(g.rows, g.depth);
        const int64_t width = block_columns(g.depth);
        for (int64_t row = 0; row < g.rows; row += SIDE * PACKED_TOGETHER) packing.push_back({&g, row, 0, 0});
        for (int64_t row = 0; row < g.rows; row += ROWS_OF_A_TASK)
            for (int64_t column = 0; column < g.columns; column += width) tasks.push_back({&g, row, column, width});
    }
#pragma omp parallel num_threads(threads)
    {
        if (amx) configure_tiles();
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < packing.size(); i++) {
            const Group& g = *packing[i].group;
            const int64_t row = packing[i].row, tiles = std::min(PACKED_TOGETHER, divided(g.rows - row, SIDE));
            pack_all(g.a, true, g.rows, g.depth, row, tiles, g.packed + packed_bytes(row, g.depth));
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) run(tasks[i], amx, packed_b + omp_get_thread_num() * bytes_of_thread);
        if (amx) release_tiles();
    }
}

}  // extern "C"
