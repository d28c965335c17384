// SPDX-License-Identifier: Apache-2.0
//
// Attention of rows of queries over the positions that each of them sees, wherever these lie in memory.
//
// Positions are taken in passes of 512, whose scores stay in the nearest cache: scores, weights
// (`softmax.h`), then values, added with these weights in one sum that goes through the pass. Passes, and
// vectors of 16 positions in them, begin at multiples of their size, and what a token does not see has
// the weight 0: so a token's result has the same bits whatever other tokens are attended to at once, as
// long as values are finite.

#ifndef MESHWEN_ATTENTION_H
#define MESHWEN_ATTENTION_H

#include "kernels.h"
#include "matmul.h"
#include "softmax.h"
#include "tile.h"

#define PASS 512                // positions
#define PANELS (PASS / COLUMNS) // of a pass
#define SHORT_SUM 16            // dimensions: scores are large beside what tells them apart

// Rows of queries that are attended to together. Those of a token stand together, token after token.
struct queries {
    const float *q; // [rows, H]
    float *y;       // the same, not yet divided by the sum of the weights
    struct row_state *states;
    int64_t rows, of_token;
    int64_t start;  // position of the first token
    int64_t window; // positions that a token sees at most
    int64_t depth;  // dimensions of the keys that are read, of H
};

// The positions of a pass. Panels are 32 positions; of those that no row sees, places mean nothing.
struct pass {
    int64_t begin;
    const char *keys[PANELS];   // [H, 32], dimensions `keys_stride` bytes apart
    const char *values[PANELS]; // [32, H]
    int64_t keys_stride, H;
    float *scores; // [12, PASS]
};

// The functions of tiles; of walking ones b goes on elsewhere after each panel.
struct tiles {
    tile_function *const *plain, *const *walking;
};

static void states_begin(struct row_state *states, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) states[i] = (struct row_state){-FLT_MAX, 0.0f};
}

// The first pass that a token sees.
static int64_t first_pass(int64_t position, int64_t window) {
    return first_seen(position, window) / PASS * PASS;
}

// The scores of the positions `from` to `end`, and more up to whole panels.
INLINE void score(enum operands kind, tile_function *const *tiles, const struct pass *pass,
                  const struct queries *of, int64_t row, int64_t rows, int64_t from, int64_t end) {
    struct tile t = {
        .a_stride = 4 * pass->H,
        .b_stride = pass->keys_stride,
        .y_stride = 4 * PASS,
        .ahead_stride = pass->keys_stride,
    };
    (void)kind;
    const float *q = of->q + row * pass->H;
    const int64_t last = (end - 1 - pass->begin) / COLUMNS;
    for (int64_t p = (from - pass->begin) / COLUMNS; p <= last; p++) {
        const char *keys = pass->keys[p], *ahead = pass->keys[p < last ? p + 1 : p];
        t.y = (char *)(pass->scores + p * COLUMNS);
        for (int64_t h = 0; h < of->depth; h += SHORT_SUM) {
            t.a = (const char *)(q + h);
            t.b = keys + h * t.b_stride;
            t.x = h ? t.y : nothing;
            t.x_stride = h ? t.y_stride : 0;
            t.steps = smaller(of->depth - h, SHORT_SUM);
            t.ahead = ahead + h * t.b_stride;
            tiles[rows - 1](&t);
        }
    }
}

// y + weights values, of the positions `from` to `end`.
INLINE void add_values(enum operands kind, tile_function *const *tiles, const struct pass *pass,
                       const struct queries *of, int64_t row, int64_t rows, int64_t from, int64_t end,
                       int is_first) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = pass->H;
    const int64_t p = (from - pass->begin) / COLUMNS, within = from % COLUMNS;
    struct tile t = {
        .a = (const char *)(pass->scores + from - pass->begin),
        .a_stride = 4 * PASS,
        .b_stride = bytes * H,
        .y_stride = 4 * H,
        .x_stride = is_first ? 0 : 4 * H,
        .steps = end - from,
        .ahead_stride = bytes * H,
        .next = pass->values + p + 1,
        .turn = COLUMNS - within,
    };
    for (int64_t d = 0; d < H; d += COLUMNS) {
        t.column = d * bytes;
        t.b = pass->values[p] + within * t.b_stride + t.column;
        t.ahead = t.b + 16 * t.b_stride;
        t.y = (char *)(of->y + row * H + d);
        t.x = is_first ? nothing : t.y;
        tiles[rows - 1](&t);
    }
}

// Adds the positions of a pass to up to 12 rows, from `row` on.
INLINE void attend_block(enum operands kind, const struct tiles *tiles, const struct pass *pass,
                         const struct queries *of, int64_t row, int64_t rows) {
    const int64_t H = pass->H, begin = pass->begin, position = of->start + row / of->of_token;
    const int64_t end =
        smaller(of->start + (row + rows - 1) / of->of_token + 1, begin + PASS);
    const int64_t first = first_seen(position, of->window), from = larger(first, begin);
    if (from >= end) return;
    score(kind, tiles->plain, pass, of, row, rows, from, end);
    const int is_first = first_pass(position, of->window) == begin;
    for (int64_t r = row; r < row + rows; r++) {
        const int64_t last = of->start + r / of->of_token;
        const float scale = weigh(pass->scores + (r - row) * PASS, begin, from / WIDE * WIDE,
                                  quotient_up(end, WIDE) * WIDE, first_seen(last, of->window), last,
                                  of->states + r);
        if (is_first) continue;
        for (int64_t d = 0; d < H; d += LANES)
            store(of->y + r * H + d, load(of->y + r * H + d) * all(scale));
    }
    add_values(kind, tiles->walking, pass, of, row, rows, from, end, is_first);
}

// Adds the positions of a pass to all rows, in blocks that are about as large as one another.
INLINE void attend_rows(enum operands kind, const struct tiles *tiles, const struct pass *pass,
                        const struct queries *of) {
    const int64_t blocks = quotient_up(of->rows, MOST_ROWS);
    for (int64_t block = 0, row = 0; block < blocks; block++) {
        const int64_t rows = quotient_up(of->rows - row, blocks - block);
        attend_block(kind, tiles, pass, of, row, rows);
        row += rows;
    }
}

#endif
