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

#include "cached.h"
#include "kernels.h"
#include "softmax.h"

#define PASS 512                // positions
#define PANELS (PASS / COLUMNS) // of a pass

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

// The positions of a pass, in panels of 32. Of those that no row sees, places mean nothing.
struct pass {
    int64_t begin;
    const char *keys[PANELS + AHEAD];   // [H, 32], dimensions `keys_stride` bytes apart
    const char *values[PANELS + AHEAD]; // [32, H]
    int64_t keys_stride, H;
    float *scores; // [12, PASS]
};

// The micro-kernels of a dtype, by the number of rows less 1.
struct attending {
    scoring_function *const *score;
    adding_function *const *add;
};

static void states_begin(struct row_state *states, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) states[i] = (struct row_state){-FLT_MAX, 0.0f};
}

// What is prefetched behind the panels from `from` to `end`: values after keys.
static void prefetch_behind(struct pass *pass, int64_t from, int64_t end) {
    const int64_t first = (from - pass->begin) / COLUMNS;
    const int64_t count = quotient_up(end - pass->begin, COLUMNS);
    for (int64_t i = 0; i < AHEAD; i++) {
        pass->keys[count + i] = pass->values[smaller(first + i, count - 1)];
        pass->values[count + i] = pass->values[count - 1];
    }
}

// The first pass that a token sees.
static int64_t first_pass(int64_t position, int64_t window) {
    return first_seen(position, window) / PASS * PASS;
}

// Adds the positions of a pass to up to 12 rows, from `row` on.
INLINE void attend_block(enum operands kind, const struct attending *by, const struct pass *pass,
                         const struct queries *of, int64_t row, int64_t rows) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = pass->H, begin = pass->begin;
    const int64_t position = of->start + row / of->of_token;
    const int64_t end = smaller(of->start + (row + rows - 1) / of->of_token + 1, begin + PASS);
    const int64_t first = first_seen(position, of->window), from = larger(first, begin);
    if (from >= end) return;
    const int64_t panel = (from - begin) / COLUMNS;
    by->score[rows - 1](&(struct scoring){
        .q = (const char *)(of->q + row * H),
        .q_stride = 4 * H,
        .keys = pass->keys + panel,
        .keys_stride = pass->keys_stride,
        .panels = quotient_up(end - begin, COLUMNS) - panel,
        .depth = of->depth,
        .scores = (char *)(pass->scores + panel * COLUMNS),
        .scores_stride = 4 * PASS,
    });
    float scales[MOST_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t last = of->start + (row + r) / of->of_token;
        scales[r] = weigh(pass->scores + r * PASS, begin, from / WIDE * WIDE,
                          quotient_up(end, WIDE) * WIDE, first_seen(last, of->window), last,
                          of->states + row + r);
    }
    const int is_first = first_pass(position, of->window) == begin;
    struct adding adding = {
        .weights = (const char *)(pass->scores + from - begin),
        .weights_stride = 4 * PASS,
        .values = pass->values + panel,
        .values_stride = bytes * H,
        .skipped = from % COLUMNS,
        .positions = end - from,
        .scales = is_first ? 0 : scales,
        .y_stride = 4 * H,
    };
    for (int64_t d = 0; d < H; d += COLUMNS) {
        adding.column = d * bytes;
        adding.y = (char *)(of->y + row * H + d);
        by->add[rows - 1](&adding);
    }
}

// Adds the positions of a pass to all rows, in blocks that are about as large as one another.
INLINE void attend_rows(enum operands kind, const struct attending *by, const struct pass *pass,
                        const struct queries *of) {
    const int64_t blocks = quotient_up(of->rows, MOST_ROWS);
    for (int64_t block = 0, row = 0; block < blocks; block++) {
        const int64_t rows = quotient_up(of->rows - row, blocks - block);
        attend_block(kind, by, pass, of, row, rows);
        row += rows;
    }
}

#endif
