// SPDX-License-Identifier: Apache-2.0
//
// The driver of a matmul with weights in panels: y = a b.
//
// A panel (32 columns of b, from its first step to its last) is multiplied with all rows of a, by
// chunks of its steps that stay in the nearest cache, for as many rows at a time as registers have room
// for. The next chunk is prefetched meanwhile. So weights are read from memory once, from one end to
// the other. Chunks of 128 additions are summed by themselves and then added up, which in float32 is
// several times as accurate as one long sum.

#ifndef MESHWEN_MATMUL_H
#define MESHWEN_MATMUL_H

#include "kernels.h"
#include "tile.h"

#define KC 128                        // additions of a chunk
#define CHUNK_BYTES (KC * STEP_BYTES) // room for a chunk, unpacked

static const char nothing[8 * COLUMNS] __attribute__((aligned(64)));

// Pairs of bfloat16 as float32: two rows of 32 columns a step.
static void unpack(char *to, const char *from, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) {
        UNROLL for (int n = 0; n < VECTORS; n++) {
            words pairs = load_bits(from + STEP_BYTES * s + 4 * LANES * n);
            store(to + 2 * STEP_BYTES * s + 4 * LANES * n, lower(pairs));
            store(to + 2 * STEP_BYTES * s + STEP_BYTES + 4 * LANES * n, upper(pairs));
        }
    }
}

// All rows of the panel `p`, or of two that are whole. `space` has room for a chunk and for the sums
// of all rows.
INLINE void multiply_panel(enum operands kind, tile_function *const *tiles, int panels,
                           const struct matmul *m, int64_t p, char *space) {
    const int64_t a_bytes = kind == WIDENED ? 8 : 4, run = kind == WIDENED ? KC / 2 : KC;
    const int64_t panel_bytes = m->steps * STEP_BYTES, a_stride = m->steps * a_bytes;
    const int64_t y_stride = 4 * m->columns, sums_stride = panels * 4 * COLUMNS;
    const int64_t columns = smaller(m->columns - p * COLUMNS, COLUMNS);
    const int whole = columns == COLUMNS;
    const char *b = m->b + p * panel_bytes;
    char *y = (char *)(m->y + p * COLUMNS), *sums = space + CHUNK_BYTES;
    // For many rows pairs are unpacked once, not in registers for each block of rows.
    const int unpacks = kind == WIDENED && m->rows > MOST_ROWS;
    const int64_t unpacked = unpacks ? 2 : 1;
    tile_function *const *used = unpacks ? tiles_FLOAT32 : tiles;
    // Rows that are one block go through memory so fast that what they need themselves is prefetched;
    // more have the next chunk prefetched, each of the first blocks its share.
    const int64_t blocks = quotient_up(m->rows, unpacks ? MR : most_rows(kind));
    const int64_t prefetching = smaller(blocks, 4);
    const int64_t ahead_stride = STEP_BYTES / (prefetching * unpacked);
    for (int64_t k = 0; k < m->steps; k += run) {
        const int64_t steps = smaller(run, m->steps - k);
        const int first = k == 0, ends = k + steps == m->steps && whole;
        const char *chunk = b + k * STEP_BYTES;
        const char *ahead = chunk + (blocks == 1 ? 1024 : steps * STEP_BYTES);
        if (unpacks) unpack(space, chunk, steps);
        struct tile t = {
            .a_stride = a_stride,
            .b = unpacks ? space : chunk,
            .b_stride = STEP_BYTES,
            .x_stride = first ? 0 : sums_stride,
            .y_stride = ends ? y_stride : sums_stride,
            .steps = steps * unpacked,
            .panel = panel_bytes,
        };
        for (int64_t block = 0, row = 0; block < blocks; block++) {
            const int64_t rows = quotient_up(m->rows - row, blocks - block);
            const int prefetches = block < prefetching;
            t.a = m->a + row * a_stride + k * a_bytes;
            t.x = first ? nothing : sums + row * sums_stride;
            t.y = ends ? y + row * y_stride : sums + row * sums_stride;
            t.ahead = prefetches ? ahead + block * t.steps * ahead_stride : t.b;
            t.ahead_stride = prefetches ? ahead_stride : 0;
            used[rows - 1](&t);
            row += rows;
        }
    }
    if (whole) return;
    for (int64_t row = 0; row < m->rows; row++) // The last panel has fewer columns.
        memcpy(y + row * y_stride, sums + row * sums_stride, 4 * columns);
}

// The unit of work: some panels, one after the other, or two at a time of few rows.
INLINE int multiply_panels(enum operands kind, tile_function *const *single,
                           tile_function *const *paired, const struct matmul *m, int64_t unit) {
    const int64_t first = unit * m->unit_panels, panels = quotient_up(m->columns, COLUMNS);
    const int64_t last = smaller(first + m->unit_panels, panels);
    const int64_t whole = smaller(last, m->columns / COLUMNS);
    char *space = allocate(CHUNK_BYTES + m->rows * 2 * 4 * COLUMNS);
    if (!space) return 0;
    for (int64_t p = first; p < last;) {
        if (m->rows <= PAIRED_MR && p + 2 <= whole) {
            multiply_panel(kind, paired, 2, m, p, space);
            p += 2;
        } else {
            multiply_panel(kind, single, 1, m, p, space);
            p += 1;
        }
    }
    release(space);
    return 1;
}

#endif
