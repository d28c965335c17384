// SPDX-License-Identifier: Apache-2.0
//
// Attention over a paged KV cache: the positions of a sequence lie in blocks, wherever its block table
// says. `paged.c` makes the units.
//
//   q float32 [N, K * G, h], scaled; keys [P, K, H, S] and values [P, K, S, H], both float32 or both
//   bfloat16; query_starts int32 [R + 1]; lengths int32 [R]; tables int32 [R, W]; window int32 [1]; y as q.
//   H and S are multiples of 32; h is at most H, and what is behind it is not read.
//
// The tokens query_starts[r] to query_starts[r + 1] are the last of the lengths[r] positions of
// sequence r. Each sees up to `window` positions, its own the last. Position p is in the block
// tables[r, p / S].

#ifndef MESHWEN_PAGED_H
#define MESHWEN_PAGED_H

#include "attention.h"

// The queries of some tokens for one key/value head, from one token's row to the next.
static void gather(float *to, const float *q, int64_t tokens, int64_t G, int64_t heads, int64_t h,
                   int64_t H) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < G; g++, to += H)
            memcpy(to, q + (t * heads + g) * h, (size_t)h * sizeof *q);
}

// The results the same way back, divided by the sums of their weights.
static void scatter(float *y, const struct queries *from, int64_t heads, int64_t h, int64_t H) {
    for (int64_t r = 0; r < from->rows; r++) {
        float *to = y + (r / from->of_token * heads + r % from->of_token) * h;
        float *row = from->y + r * H;
        for (int64_t d = 0; d < H; d += LANES)
            store(row + d, load(row + d) / all(from->states[r].sum));
        memcpy(to, row, (size_t)h * sizeof *to);
    }
}

// Where the panels are of the positions `from` to `end` of a pass.
INLINE void locate(enum operands kind, struct pass *pass, const struct paged_attention *of,
                   const int32_t *table, int64_t head, int64_t from, int64_t end) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = of->H, S = of->S;
    for (int64_t j = from / COLUMNS * COLUMNS; j < end; j += COLUMNS) {
        const int64_t panel = (j - pass->begin) / COLUMNS, within = j % S;
        const int64_t block = (table[j / S] * of->K + head) * H * S;
        pass->keys[panel] = of->keys + (block + within) * bytes;
        pass->values[panel] = of->values + (block + within * H) * bytes;
    }
}

// The unit of work: all queries of a key/value head, of some tokens of a sequence.
INLINE int attend_tokens(enum operands kind, const struct tiles *tiles,
                         const struct paged_attention *of, int64_t number) {
    const struct paged_unit unit = of->units[number];
    const int64_t H = of->H, h = of->h, G = of->G, heads = of->K * G, rows = unit.tokens * G;
    const int64_t scores_bytes = MOST_ROWS * PASS * sizeof(float);
    const int64_t rows_bytes = rows * H * sizeof(float);
    char *space = allocate(scores_bytes + 2 * rows_bytes + rows * sizeof(struct row_state));
    if (!space) return 0;
    float *q = (float *)(space + scores_bytes);
    const struct queries queries = {
        .q = q,
        .y = (float *)(space + scores_bytes + rows_bytes),
        .states = (struct row_state *)(space + scores_bytes + 2 * rows_bytes),
        .rows = rows,
        .of_token = G,
        .start = unit.position,
        .window = of->window,
        .depth = h,
    };
    const int64_t place = (unit.token * heads + unit.head * G) * h;
    gather(q, of->q + place, unit.tokens, G, heads, h, H);
    states_begin(queries.states, rows);
    struct pass pass = {
        .keys_stride = of->S * (kind == FLOAT32 ? 4 : 2),
        .H = H,
        .scores = (float *)space,
    };
    const int32_t *table = of->tables + unit.sequence * of->W;
    const int64_t first = first_seen(unit.position, of->window), end = unit.position + unit.tokens;
    for (pass.begin = first / PASS * PASS; pass.begin < end; pass.begin += PASS) {
        locate(kind, &pass, of, table, unit.head, larger(first, pass.begin),
               smaller(pass.begin + PASS, end));
        attend_rows(kind, tiles, &pass, &queries);
    }
    scatter(of->y + place, &queries, heads, h, H);
    release(space);
    return 1;
}

#endif
