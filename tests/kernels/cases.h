// SPDX-License-Identifier: Apache-2.0
//
// Calls of each entry with random numbers, and what their results have to be, in double.

#ifndef CASES_H
#define CASES_H

#include "xla.h"

// The weights and the rows that are multiplied with them.
enum kind {
    FLOAT32,
    WIDENED, // float32 with bfloat16
    DOT,     // bfloat16 with bfloat16, by the instruction for it
    INT8,
    KINDS
};

// y [rows, columns] of `steps` steps of 4 bytes; in int8 of so many groups.
struct product {
    enum kind kind;
    int64_t rows, steps, columns;
    int tiny; // whether all rows are subnormal
};

// Attention over blocks, of sequences of these lengths, the last tokens of each.
#define SEQUENCES 3
struct paged {
    XLA_FFI_DataType dtype;
    int64_t K, G, h, H, S, window;
    int64_t lengths[SEQUENCES], tokens[SEQUENCES];
};

// Writes of N tokens to P blocks, to scattered slots, some of them to none or to the same.
struct writes {
    XLA_FFI_DataType dtype;
    int64_t P, K, h, H, S, N;
};

XLA_FFI_Handler *product_entry(struct product of);
// Makes a frame's buffers. What may not be read or does not count is NaN.
void product_frame(struct frame *frame, struct product of, enum side side);
void paged_frame(struct frame *frame, struct paged of, enum side side);
void writes_frame(struct frame *frame, struct writes of, enum side side);
// Checks the result against the bound on rounding errors.
void product_check(const struct frame *frame, struct product of);
void paged_check(const struct frame *frame, struct paged of);
void writes_check(const struct frame *frame, struct writes of);

// Calls and checks on each number of a frame; the context is in `at`.
void run_product(const char *set, int64_t threads, struct product of, enum side side);
void run_paged(const char *set, int64_t threads, struct paged of, enum side side);
void run_writes(const char *set, int64_t threads, struct writes of, enum side side);

// Does something with every instruction set that this processor has.
void with_each_set(void (*function)(const char *set, int has_bf16_dot));

#endif
