// SPDX-License-Identifier: Apache-2.0
//
// Every size that is taken in another way, from 0 up: results are right, and nothing outside of the
// buffers is read or written.

#include "tests.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

// One block of rows and several of each instruction set, whole and in parts.
static const int64_t ROWS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17, 24, 25, 37, 50};
// Fewer columns than a panel, whole panels, parts of one; an odd and an even number of panels.
static const int64_t WIDTHS[] = {1, 2, 15, 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 128, 159, 192};
// Chunks are of 64 pairs or of 128 numbers.
static const int64_t STEPS[] = {1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 193, 257};

static void products(const char *set, int has_bf16_dot) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (kind == DOT && !has_bf16_dot) continue;
        for (int i = 0; i < 3 * COUNT(ROWS); i++) {
            struct product of = {kind, ROWS[i % COUNT(ROWS)], STEPS[i % COUNT(STEPS)],
                                 WIDTHS[i * 5 % COUNT(WIDTHS)], 0};
            if (kind == INT8) of.steps = 1 + of.steps % 5;
            run_product(set, i % 2 ? 8 : 1, of, i / 2 % SIDES);
        }
        // Two whole panels at once of few rows, in chunks; a pair of which one is not whole; many units.
        run_product(set, 8, (struct product){kind, 1, 131, 64, 0}, AT_END);
        run_product(set, 8, (struct product){kind, 1, 131, 33, 0}, AT_END);
        run_product(set, 8, (struct product){kind, 1, 3, 32 * 70, 0}, AT_END);
        run_product(set, 8, (struct product){kind, 6, 3, 32 * 67 + 1, 0}, AT_BEGIN);
        for (int side = 0; side < SIDES; side++) { // Nothing to do.
            run_product(set, 8, (struct product){kind, 0, 3, 33, 0}, side);
            run_product(set, 8, (struct product){kind, 3, 3, 0, 0}, side);
            run_product(set, 8, (struct product){kind, 0, 0, 0, 0}, side);
            run_product(set, 8, (struct product){kind, 0, 0, 40, 0}, side);
        }
    }
    // Rows enough for threads to share their quantisation.
    run_product(set, 8, (struct product){INT8, 257, 4, 33, 0}, AT_END);
}

static const struct paged PAGED[] = {
    // K, G, h, H, S, window, lengths, tokens
    {F32, 1, 1, 32, 32, 32, INT32_MAX, {1, 32, 33}, {1, 1, 1}},
    {F32, 2, 7, 64, 64, 32, INT32_MAX, {600, 0, 64}, {1, 0, 1}},  // two passes, no sequence
    {F32, 2, 3, 40, 64, 32, 5, {70, 9, 1030}, {9, 9, 1}},         // fewer dimensions than the pool's
    {F32, 1, 2, 1, 32, 96, 513, {544, 97, 96}, {3, 1, 96}},       // blocks of more than a panel
    {F32, 1, 13, 17, 32, 64, INT32_MAX, {40, 0, 0}, {40, 0, 0}},  // rows of a token in two blocks of rows
    {F32, 3, 1, 32, 96, 32, 1, {530, 2, 512}, {130, 2, 1}},       // several units, windows of one
    {F32, 1, 100, 32, 32, 32, INT32_MAX, {33, 3, 0}, {2, 3, 0}},  // a unit has a token
    {F32, 1, 2, 32, 32, 32, 1, {1056, 512, 1}, {1, 1, 1}},        // one position
    {F32, 2, 13, 32, 32, 96, 7, {96, 8, 0}, {1, 1, 0}},           // rows of a decode step in two blocks
    {F32, 1, 1, 32, 32, 544, INT32_MAX, {544, 35, 13}, {35, 35, 13}}, // a pass of all rows, and of some
    {F32, 1, 2, 96, 96, 32, 511, {1056, 530, 12}, {14, 25, 12}},
    {F32, 2, 1, 32, 32, 32, 64, {576, 70, 0}, {70, 70, 0}},       // windows that begin in another pass
    // Nothing to do: of no tokens, heads, dimensions.
    {F32, 1, 1, 32, 32, 32, 1, {5, 0, 0}, {0, 0, 0}},
    {F32, 0, 1, 32, 32, 32, 1, {5, 0, 0}, {1, 0, 0}},
    {F32, 1, 0, 32, 32, 32, 1, {5, 0, 0}, {1, 0, 0}},
    {F32, 1, 1, 0, 32, 32, 1, {5, 0, 0}, {1, 0, 0}},
};
static const struct writes WRITES[] = {
    // P, K, h, H, S, N
    {F32, 1, 1, 1, 32, 32, 1},  {F32, 3, 2, 64, 64, 32, 40},  {F32, 2, 3, 40, 64, 96, 300},
    {F32, 4, 4, 64, 64, 32, 130}, {F32, 2, 1, 32, 32, 32, 0}, {F32, 0, 1, 32, 32, 32, 0},
    {F32, 2, 0, 32, 32, 32, 5},
};

static void paged(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    for (int i = 0; i < 2 * COUNT(PAGED); i++)
        for (int side = 0; side < SIDES; side++) {
            struct paged of = PAGED[i / 2];
            of.dtype = i & 1 ? BF16 : F32;
            run_paged(set, i % 3 ? 8 : 1, of, side);
        }
}

void test_paged(void) { with_each_set(paged); }

void test_writes(void) {
    for (int i = 0; i < 2 * COUNT(WRITES); i++)
        for (int side = 0; side < SIDES; side++) {
            struct writes of = WRITES[i / 2];
            of.dtype = i & 1 ? BF16 : F32;
            run_writes("portable", i % 3 ? 8 : 1, of, side);
        }
}

void test_products(void) { with_each_set(products); }
