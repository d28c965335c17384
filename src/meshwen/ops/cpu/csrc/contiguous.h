// SPDX-License-Identifier: Apache-2.0
//
// Attention of tokens that follow one another over a KV cache that has a row for each sequence.
//
//   q float32 [B, K * G, T, H], scaled; keys [C, K, H, S] and values [C, K, S, H], both float32 or both
//   bfloat16; rows int32 [B], of the cache; starts int32 [B]; window int32 [1]; y as q.
//   H and S are multiples of 32.
//
// Token t of sequence b is at position starts[b] + t, and sees up to `window` positions, its own the
// last.

#ifndef MESHWEN_CONTIGUOUS_H
#define MESHWEN_CONTIGUOUS_H

#include "attention.h"

// The keys of the positions from `begin` to `end` in panels of 32, one behind the other.
INLINE void copy_keys(enum operands kind, char *to, const char *keys, int64_t begin, int64_t end,
                      int64_t H, int64_t S) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    for (int64_t j = begin; j < end; j += COLUMNS)
        for (int64_t h = 0; h < H; h++, to += COLUMNS * bytes)
            memcpy(to, keys + (h * S + j) * bytes, kind == FLOAT32 ? 4 * COLUMNS : 2 * COLUMNS);
}

// The unit of work: all queries of a key/value head, of single tokens; else all tokens of a query head.
INLINE int attend_head(enum operands kind, const struct attending *by, const struct attention *of,
                       int64_t unit) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = of->H, S = of->S, single = of->T == 1;
    const int64_t length = single ? of->G : of->T, head = single ? unit : unit / of->G;
    const int64_t b = head / of->K, k = head % of->K;
    const int64_t start = of->starts[b], offset = (of->rows[b] * of->K + k) * S * H * bytes;
    const int64_t copied_bytes = length > MOST_ROWS ? PASS * H * bytes : 0;
    const int64_t scores_bytes = MOST_ROWS * PASS * sizeof(float);
    char *space = allocate(scores_bytes + copied_bytes + length * sizeof(struct row_state));
    if (!space) return 0;
    char *copied = copied_bytes ? space + scores_bytes : 0;
    const struct queries queries = {
        .q = of->q + unit * length * H,
        .y = of->y + unit * length * H,
        .states = (struct row_state *)(space + scores_bytes + copied_bytes),
        .rows = length,
        .of_token = single ? of->G : 1,
        .start = start,
        .window = of->window,
        .depth = H,
    };
    states_begin(queries.states, length);
    struct pass pass = {
        .keys_stride = (copied ? COLUMNS : S) * bytes,
        .H = H,
        .scores = (float *)space,
    };
    const int64_t end = start + of->T;
    for (pass.begin = first_pass(start, of->window); pass.begin < end; pass.begin += PASS) {
        const int64_t stop = smaller(pass.begin + PASS, end);
        const char *keys = of->keys + offset + pass.begin * bytes;
        if (copied) copy_keys(kind, copied, of->keys + offset, pass.begin, stop, H, S);
        for (int64_t j = pass.begin, p = 0; j < stop; j += COLUMNS, p++) {
            pass.keys[p] = copied ? copied + p * H * COLUMNS * bytes : keys + p * COLUMNS * bytes;
            pass.values[p] = of->values + offset + j * H * bytes;
        }
        prefetch_behind(&pass, pass.begin, stop);
        attend_rows(kind, by, &pass, &queries);
    }
    for (int64_t r = 0; r < length; r++)
        for (int64_t d = 0; d < H; d += LANES)
            store(queries.y + r * H + d, load(queries.y + r * H + d) / all(queries.states[r].sum));
    release(space);
    return 1;
}

#endif
