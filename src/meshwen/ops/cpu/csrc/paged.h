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

// Where a unit's panel of a position is in the pool, in numbers: of its keys, and of its values.
struct place {
    int64_t keys, values;
};

static struct place placed(const struct paged_attention *of, const struct paged_unit *unit,
                           int64_t position) {
    const int32_t block = of->tables[unit->sequence * of->W + position / of->S];
    const int64_t begin = (block * of->K + unit->head) * of->H * of->S;
    const int64_t within = position % of->S / COLUMNS * COLUMNS;
    return (struct place){begin + within, begin + within * of->H};
}

// Finds the panels of a pass, of those of the positions from `first` to `end`.
INLINE void locate(enum operands kind, struct pass *pass, const struct paged_attention *of,
                   const struct paged_unit *unit, int64_t first, int64_t end) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, begin = pass->begin;
    const int64_t from = larger(first, begin), stop = smaller(begin + PASS, end);
    for (int64_t j = from / COLUMNS * COLUMNS; j < stop; j += COLUMNS) {
        const struct place place = placed(of, unit, j);
        pass->keys[(j - begin) / COLUMNS] = of->keys + place.keys * bytes;
        pass->values[(j - begin) / COLUMNS] = of->values + place.values * bytes;
    }
    prefetch_behind(pass, from, stop);
}

// The keys of the first panels of a unit from a position on, as far as it has them. Returns how many.
INLINE int64_t first_keys(enum operands kind, const char **keys, const struct paged_attention *of,
                          const struct paged_unit *unit, int64_t position) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, end = unit->position + unit->tokens;
    int64_t count = 0;
    for (; count < AHEAD && position < end; count++, position += COLUMNS)
        keys[count] = of->keys + placed(of, unit, position).keys * bytes;
    return count;
}

static int64_t first_of(const struct paged_attention *of, const struct paged_unit *unit) {
    return first_seen(unit->position, of->window);
}

// The keys that are read next are prefetched while the last values are added: those of the next pass, or
// of the unit that this thread takes next if all threads keep pace.
INLINE void prefetch_next(enum operands kind, struct pass *pass, const struct paged_attention *of,
                          int64_t number, int64_t end) {
    const struct paged_unit *unit = of->units + number;
    int64_t position = pass->begin + PASS;
    const int64_t count = smaller(quotient_up(end - pass->begin, COLUMNS), PANELS);
    if (position >= end) {
        if (of->count - number <= of->threads) return;
        unit += of->threads;
        position = first_of(of, unit);
    }
    first_keys(kind, pass->values + count, of, unit, position);
}

// Prefetches the first keys of a unit.
INLINE void prefetch_first(enum operands kind, const struct paged_attention *of,
                           const struct paged_unit *unit) {
    const char *keys[AHEAD];
    const int64_t count = first_keys(kind, keys, of, unit, first_of(of, unit));
    for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < of->h; h++)
            PREFETCH(keys[i] + h * of->S * (kind == FLOAT32 ? 4 : 2), 3);
}

// The unit of work: all queries of a key/value head, of some tokens of a sequence.
INLINE int attend_tokens(enum operands kind, const struct attending *by,
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
    prefetch_first(kind, of, &unit);
    const int64_t place = (unit.token * heads + unit.head * G) * h;
    gather(q, of->q + place, unit.tokens, G, heads, h, H);
    states_begin(queries.states, rows);
    struct pass pass = {
        .keys_stride = of->S * (kind == FLOAT32 ? 4 : 2),
        .H = H,
        .scores = (float *)space,
    };
    const int64_t first = first_of(of, &unit), end = unit.position + unit.tokens;
    for (pass.begin = first / PASS * PASS; pass.begin < end; pass.begin += PASS) {
        locate(kind, &pass, of, &unit, first, end);
        prefetch_next(kind, &pass, of, number, end);
        attend_rows(kind, by, &pass, &queries);
    }
    scatter(of->y + place, &queries, heads, h, H);
    release(space);
    return 1;
}

#endif
