// SPDX-License-Identifier: Apache-2.0
//
// The micro-kernel: a tile of y = x + a b, up to 12 rows and 32 columns (or twice 32), whose sums stay
// in registers while k runs over b. A step of k is the same few bytes of every row of a and column of b.
//
// Each sum has one order of additions, k = 0, 1, ... from +0.0, whatever the rows and columns beside it.

#ifndef MESHWEN_TILE_H
#define MESHWEN_TILE_H

#include "panels.h"
#include "vec.h"

#define VECTORS (COLUMNS / LANES) // of a row of 32 columns
#define MOST_ROWS 12              // of a tile; more than MR are taken in parts
#define PREFETCH(at, level) __builtin_prefetch((at), 0, (level))

// What is multiplied in a step.
enum operands {
    FLOAT32, // a number of a with one of b
    WIDENED, // two float32 of a with a pair of bfloat16 of b, by two fused multiply-adds
    DOT,     // a pair of bfloat16 of a with one of b, by the instruction for it
    CACHED,  // a float32 of a with a bfloat16 of b, of which 64 bytes are a row: see `cached.h`
};

// y, x and a have their rows a stride apart, b its steps; strides are in bytes.
struct tile {
    const char *a;
    int64_t a_stride;
    const char *b;
    int64_t b_stride;
    const char *x;
    int64_t x_stride;
    char *y;
    int64_t y_stride;
    int64_t steps;
    const char *ahead; // what is to be prefetched meanwhile: 128 bytes each stride
    int64_t ahead_stride;
    int64_t panel; // by how much the second panel lies behind the first
};

typedef void tile_function(const struct tile *);

#if defined(MESHWEN_DOT)
// y + a.lower b.lower + a.upper b.upper, as the instruction rounds it.
INLINE floats dot(floats y, words a, words b) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)y, (__m512bh)a, (__m512bh)b);
#elif LANES == 4 && defined(__ARM_FEATURE_BF16)
    return (floats)vbfdotq_f32((float32x4_t)y, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else // What stands in for it in tests; it may round otherwise.
    return fused(lower(a), lower(b), fused(upper(a), upper(b), y));
#endif
}
#endif

INLINE float number(const char *at) {
    float x;
    memcpy(&x, at, sizeof x);
    return x;
}

// A vector of columns of b; where it is WIDENED, one number of each pair.
INLINE floats of_columns(enum operands kind, int half, const char *b) {
    if (kind == CACHED) return load_bfloat16(b);
    if (kind == WIDENED) return half ? upper(load_bits(b)) : lower(load_bits(b));
    return load(b);
}

INLINE floats added(enum operands kind, floats sum, floats row, floats columns) {
#if defined(MESHWEN_DOT)
    if (kind == DOT) return dot(sum, (words)row, (words)columns);
#else
    (void)kind;
#endif
    return fused(row, columns, sum);
}

// A step: adds the columns at `b` times a number of each row of a, `offset` bytes from its begin.
INLINE void add_step(enum operands kind, int rows, int vectors, floats sums[MOST_ROWS][2 * VECTORS],
                     const char *const *a, int64_t offset, const char *b, int64_t panel) {
    const int vector_bytes = kind == CACHED ? 2 * LANES : 4 * LANES;
    const int parts = kind == WIDENED ? 2 : 1;
    floats held[2 * MOST_ROWS];
#define ROW(i, half) all(number(a[i] + offset + 4 * (half)))
#define COLUMNS_OF(n, half) \
    of_columns(kind, half, b + (n) / VECTORS * panel + (n) % VECTORS * vector_bytes)
    if (rows < vectors) { // Registers hold the fewer operands: of a,
        UNROLL for (int i = 0; i < rows * parts; i++) held[i] = ROW(i / parts, i % parts);
        UNROLL for (int n = 0; n < vectors; n++) {
            UNROLL for (int half = 0; half < parts; half++) {
                floats columns = COLUMNS_OF(n, half);
                UNROLL for (int i = 0; i < rows; i++)
                    sums[i][n] = added(kind, sums[i][n], held[i * parts + half], columns);
            }
        }
    } else { // or of b.
        UNROLL for (int half = 0; half < parts; half++) {
            UNROLL for (int n = 0; n < vectors; n++) held[n] = COLUMNS_OF(n, half);
            UNROLL for (int i = 0; i < rows; i++) {
                floats row = ROW(i, half);
                UNROLL for (int n = 0; n < vectors; n++)
                    sums[i][n] = added(kind, sums[i][n], row, held[n]);
            }
        }
    }
}

INLINE void multiply(enum operands kind, int rows, int panels, const struct tile *t) {
    const int a_bytes = kind == WIDENED ? 8 : 4, vectors = panels * VECTORS;
    const char *a[MOST_ROWS];
    floats sums[MOST_ROWS][2 * VECTORS];
    UNROLL for (int i = 0; i < rows; i++) {
        a[i] = t->a + i * t->a_stride;
        UNROLL for (int n = 0; n < vectors; n++) sums[i][n] = all(0.0f);
    }
    const char *b = t->b, *ahead = t->ahead, *x = t->x;
    char *y = t->y;
    const int64_t steps = t->steps, b_stride = t->b_stride, ahead_stride = t->ahead_stride;
    const int64_t panel = t->panel, x_stride = t->x_stride, y_stride = t->y_stride;
    for (int64_t k = 0; k < steps; k++) {
        UNROLL for (int p = 0; p < panels; p++) {
            PREFETCH(ahead + p * panel, 3);
            PREFETCH(ahead + p * panel + 64, 3);
        }
        add_step(kind, rows, vectors, sums, a, k * a_bytes, b, panel);
        b += b_stride;
        ahead += ahead_stride;
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int n = 0; n < vectors; n++) {
            floats before = load(x + i * x_stride + 4 * LANES * n);
            store(y + i * y_stride + 4 * LANES * n, before + sums[i][n]);
        }
    }
}

// How many rows registers have room for.
INLINE int most_rows(enum operands kind) { return kind == WIDENED ? WIDENED_MR : MR; }

// More rows than that; the first part prefetches.
INLINE void multiply_parts(tile_function *const *single, int most, int rows, const struct tile *t) {
    const int parts = (rows + most - 1) / most;
    for (int p = 0; p < parts; p++) {
        const int begin = p * rows / parts, end = (p + 1) * rows / parts;
        struct tile part = *t;
        part.a += begin * t->a_stride;
        part.x += begin * t->x_stride;
        part.y += begin * t->y_stride;
        if (p > 0) part.ahead = t->b, part.ahead_stride = 0;
        single[end - begin - 1](&part);
    }
}

// A function for every number of rows of one panel, and of few rows of two.
#define SINGLE(kind, rows)                                                                           \
    static void tile_##kind##_##rows(const struct tile *t) {                                         \
        if (rows <= most_rows(kind))                                                                 \
            multiply(kind, rows <= most_rows(kind) ? rows : 1, 1, t);                                \
        else                                                                                         \
            multiply_parts(tiles_##kind, most_rows(kind), rows, t);                                  \
    }
#define PAIRED(kind, rows)                                                                           \
    static void paired_##kind##_##rows(const struct tile *t) {                                       \
        multiply(kind, rows <= PAIRED_MR ? rows : 1, 2, t);                                          \
    }
#define SINGLES(kind)                                                                                \
    static tile_function *const tiles_##kind[MOST_ROWS];                                             \
    SINGLE(kind, 1) SINGLE(kind, 2) SINGLE(kind, 3) SINGLE(kind, 4)                                  \
    SINGLE(kind, 5) SINGLE(kind, 6) SINGLE(kind, 7) SINGLE(kind, 8)                                  \
    SINGLE(kind, 9) SINGLE(kind, 10) SINGLE(kind, 11) SINGLE(kind, 12)                               \
    static tile_function *const tiles_##kind[MOST_ROWS] = {                                          \
        tile_##kind##_1, tile_##kind##_2,  tile_##kind##_3,  tile_##kind##_4,                        \
        tile_##kind##_5, tile_##kind##_6,  tile_##kind##_7,  tile_##kind##_8,                        \
        tile_##kind##_9, tile_##kind##_10, tile_##kind##_11, tile_##kind##_12};
#define PAIREDS(kind)                                                                                \
    PAIRED(kind, 1) PAIRED(kind, 2) PAIRED(kind, 3)                                                  \
    PAIRED(kind, 4) PAIRED(kind, 5) PAIRED(kind, 6)                                                  \
    static tile_function *const paired_##kind[] = {paired_##kind##_1, paired_##kind##_2,             \
                                                   paired_##kind##_3, paired_##kind##_4,             \
                                                   paired_##kind##_5, paired_##kind##_6};

SINGLES(FLOAT32)
PAIREDS(FLOAT32)
SINGLES(WIDENED)
PAIREDS(WIDENED)
#if defined(MESHWEN_DOT)
SINGLES(DOT)
PAIREDS(DOT)
#endif

#endif
