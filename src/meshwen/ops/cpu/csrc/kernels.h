// SPDX-License-Identifier: Apache-2.0
//
// What an instruction set's kernels are asked for. Each works on one unit of a task, whose entry has
// checked every size: see `entries.c`.

#ifndef MESHWEN_KERNELS_H
#define MESHWEN_KERNELS_H

#include <stdint.h>

// y = a b: a [rows, steps] of `a_bytes` a step, b in panels, y [rows, columns].
struct matmul {
    const char *a;
    const char *b;
    float *y;
    int64_t rows, steps, columns;
    int64_t unit_panels; // of a unit
};

// The same, of b in int8; a is quantised first.
struct int8_matmul {
    const float *a;
    int8_t *quantised;       // [rows, groups, 32]
    float *a_scales;         // [rows, groups]
    int32_t *corrections;    // [rows, groups]: what sums begin with
    const int8_t *b;         // [panels, steps, 32, 4]
    const uint16_t *b_scales; // bfloat16 [panels, groups, 32]
    float *y;
    int64_t rows, groups, columns;
    int64_t unit_rows, unit_panels; // of a unit of either task
};

// Tokens of a sequence, and a key/value head whose queries they are.
struct paged_unit {
    int64_t sequence, head;
    int64_t token, tokens; // the first in q, and how many
    int64_t position;      // of the first
};

// Attention over a paged cache: see `paged.h`.
struct paged_attention {
    const float *q;
    const char *keys, *values;
    float *y;
    const int32_t *tables;
    const struct paged_unit *units;
    int64_t count, threads; // units; threads that may take them
    int64_t window;
    int64_t K, G, h, H, S, W;
};

// A unit of a task; false where there is no memory for it.
typedef int unit_function(const void *task, int64_t unit);

struct float_kernels {
    unit_function *matmul_float32;
    unit_function *matmul_widened; // float32 with bfloat16 that is widened to float32
    unit_function *matmul_dot;     // bfloat16 with bfloat16 by an instruction for it; or 0
    unit_function *paged_float32;
    unit_function *paged_bfloat16;
};

struct int8_kernels {
    unit_function *quantise;
    unit_function *matmul;
};

static inline int64_t quotient_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory that begins at a cache line; 0 where there is none.
void *allocate(int64_t bytes);
void release(void *memory);

#endif
