// SPDX-License-Identifier: Apache-2.0
//
// The micro-kernels of attention, for up to 12 rows: they walk through panels of the KV cache, which are
// 32 positions each, wherever these lie. The operands are FLOAT32 or CACHED.

#ifndef MESHWEN_CACHED_H
#define MESHWEN_CACHED_H

#include "kernels.h"
#include "tile.h"

#define SHORT_SUM 16 // dimensions: scores are large beside what tells them apart
#define AHEAD 3      // panels: what is prefetched

// scores = q keys: 32 of each panel, one panel beside the other. Strides are in bytes.
struct scoring {
    const char *q;
    int64_t q_stride;
    const char *const *keys; // panels [depth, 32]; AHEAD more may be prefetched
    int64_t keys_stride;
    int64_t panels, depth;
    char *scores;
    int64_t scores_stride;
};

// y = y scale + weights values, of 32 dimensions; y = 0.0 before the first.
struct adding {
    const char *weights;
    int64_t weights_stride;
    const char *const *values; // panels [32, dimensions]; AHEAD more may be prefetched
    int64_t values_stride;
    int64_t skipped, positions; // of the first panel; and how many are added behind them
    int64_t column;             // bytes before these dimensions
    const float *scales;        // of each row, or 0: it is the first
    char *y;
    int64_t y_stride;
};

typedef void scoring_function(const struct scoring *);
typedef void adding_function(const struct adding *);

INLINE void clear(int rows, floats sums[MOST_ROWS][2 * VECTORS]) {
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int n = 0; n < VECTORS; n++) sums[i][n] = all(0.0f);
}

INLINE void score_rows(enum operands kind, int rows, const struct scoring *s) {
    const char *q[MOST_ROWS];
    UNROLL for (int i = 0; i < rows; i++) q[i] = s->q + i * s->q_stride;
    const int64_t stride = s->keys_stride, depth = s->depth;
    for (int64_t p = 0; p < s->panels; p++) {
        floats totals[MOST_ROWS][2 * VECTORS], sums[MOST_ROWS][2 * VECTORS];
        const char *keys = s->keys[p], *ahead = s->keys[p + AHEAD];
        clear(rows, totals);
        for (int64_t h = 0; h < depth;) {
            const int64_t end = smaller(h + SHORT_SUM, depth);
            clear(rows, sums);
            for (; h < end; h++) {
                PREFETCH(ahead, 3);
                if (kind == FLOAT32) PREFETCH(ahead + 64, 3);
                add_step(kind, rows, VECTORS, sums, q, 4 * h, keys, 0);
                keys += stride;
                ahead += stride;
            }
            UNROLL for (int i = 0; i < rows; i++)
                UNROLL for (int n = 0; n < VECTORS; n++) totals[i][n] = totals[i][n] + sums[i][n];
        }
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int n = 0; n < VECTORS; n++)
                store(s->scores + i * s->scores_stride + 4 * (p * COLUMNS + n * LANES), totals[i][n]);
    }
}

INLINE void add_rows(enum operands kind, int rows, const struct adding *s) {
    const char *weights[MOST_ROWS];
    floats sums[MOST_ROWS][2 * VECTORS];
    UNROLL for (int i = 0; i < rows; i++) weights[i] = s->weights + i * s->weights_stride;
    clear(rows, sums);
    const int64_t stride = s->values_stride, positions = s->positions, column = s->column;
    const char *const *panel = s->values;
    int64_t k = 0, begin = s->skipped;
    while (k < positions) {
        const char *values = *panel + begin * stride + column;
        const char *ahead = panel[AHEAD] + begin * stride + column;
        const int64_t end = smaller(k + COLUMNS - begin, positions);
        for (; k < end; k++) {
            PREFETCH(ahead, 3);
            PREFETCH(ahead + 64, 3);
            add_step(kind, rows, VECTORS, sums, weights, 4 * k, values, 0);
            values += stride;
            ahead += stride;
        }
        begin = 0;
        panel++;
    }
    const float *scales = s->scales;
    char *y = s->y;
    const int64_t y_stride = s->y_stride;
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int n = 0; n < VECTORS; n++) {
            char *at = y + i * y_stride + 4 * LANES * n;
            floats before = scales ? load(at) * all(scales[i]) : all(0.0f);
            store(at, before + sums[i][n]);
        }
    }
}

// Functions for every number of rows. Those that registers have no room for are taken in parts.
INLINE void score_parts(scoring_function *const *functions, int rows, const struct scoring *s) {
    const int parts = (rows + MR - 1) / MR;
    for (int p = 0; p < parts; p++) {
        const int begin = p * rows / parts, end = (p + 1) * rows / parts;
        struct scoring part = *s;
        part.q += begin * s->q_stride;
        part.scores += begin * s->scores_stride;
        functions[end - begin - 1](&part);
    }
}

INLINE void add_parts(adding_function *const *functions, int rows, const struct adding *s) {
    const int parts = (rows + MR - 1) / MR;
    for (int p = 0; p < parts; p++) {
        const int begin = p * rows / parts, end = (p + 1) * rows / parts;
        struct adding part = *s;
        part.weights += begin * s->weights_stride;
        part.y += begin * s->y_stride;
        if (s->scales) part.scales += begin;
        functions[end - begin - 1](&part);
    }
}

#define OF_ROWS(name, kind, rows)                                                                    \
    static void name##_##kind##_##rows(const struct NAME_OF_##name *s) {                             \
        if (rows <= MR)                                                                              \
            name##_rows(kind, rows <= MR ? rows : 1, s);                                             \
        else                                                                                         \
            name##_parts(name##_##kind, rows, s);                                                    \
    }
#define NAME_OF_score scoring
#define NAME_OF_add adding
#define CACHED_FUNCTIONS(name, type, kind)                                                           \
    static type *const name##_##kind[MOST_ROWS];                                                     \
    OF_ROWS(name, kind, 1) OF_ROWS(name, kind, 2) OF_ROWS(name, kind, 3) OF_ROWS(name, kind, 4)      \
    OF_ROWS(name, kind, 5) OF_ROWS(name, kind, 6) OF_ROWS(name, kind, 7) OF_ROWS(name, kind, 8)      \
    OF_ROWS(name, kind, 9) OF_ROWS(name, kind, 10) OF_ROWS(name, kind, 11) OF_ROWS(name, kind, 12)   \
    static type *const name##_##kind[MOST_ROWS] = {                                                  \
        name##_##kind##_1, name##_##kind##_2,  name##_##kind##_3,  name##_##kind##_4,                \
        name##_##kind##_5, name##_##kind##_6,  name##_##kind##_7,  name##_##kind##_8,                \
        name##_##kind##_9, name##_##kind##_10, name##_##kind##_11, name##_##kind##_12};

CACHED_FUNCTIONS(score, scoring_function, FLOAT32)
CACHED_FUNCTIONS(score, scoring_function, CACHED)
CACHED_FUNCTIONS(add, adding_function, FLOAT32)
CACHED_FUNCTIONS(add, adding_function, CACHED)

#endif
