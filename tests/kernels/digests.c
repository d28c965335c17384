// SPDX-License-Identifier: Apache-2.0
//
// Prints what the bits of each ordered kernel are, of every instruction set that this processor has: a
// line with the set, the kernel and a digest. In exact numerics digests are the same on every processor.

#include <stdio.h>
#include <string.h>

#include "xla.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static uint64_t state;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

// Exponents of numbers that are multiplied: alike, far apart, so small that products are subnormal.
struct range {
    const char *name;
    int least, most;
};
static const struct range RANGES[] = {{"near", -3, 3}, {"far", -30, 30}, {"subnormal", -80, -62}};

// The bits of a float32 of random sign and mantissa.
static uint32_t number(struct range range) {
    const uint32_t bits = random_bits();
    const uint32_t exponent = (uint32_t)(127 + range.least) +
                              random_bits() % (uint32_t)(range.most - range.least + 1);
    return (bits & 0x807FFFFF) | exponent << 23;
}

// A buffer of random numbers; `kept` are the bits of a float32 that count.
static void *filled(struct frame *frame, XLA_FFI_DataType dtype, uint32_t kept, struct range range,
                    int rank, const int64_t *dims) {
    void *data = frame_buffer(frame, dtype, AT_END, rank, dims);
    int64_t count = 1;
    for (int i = 0; i < rank; i++) count *= dims[i];
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = number(range) & kept;
        if (dtype == F32)
            memcpy((char *)data + 4 * i, &bits, 4);
        else if (dtype == BF16)
            ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
        else
            ((int8_t *)data)[i] = (int8_t)bits;
    }
    return data;
}

// FNV-1a, of one result after another.
static uint64_t digest;

static void call(struct frame *frame, XLA_FFI_Handler *entry) {
    frame_ready(frame);
    const XLA_FFI_Error *error = frame_call(frame, entry);
    CHECK(!error, "refused: %s", error->message);
    const XLA_FFI_Buffer *y = &frame->buffers[frame->count - 1];
    size_t bytes = dtype_size(y->dtype);
    for (int i = 0; i < y->rank; i++) bytes *= (size_t)y->dims[i];
    for (size_t i = 0; i < bytes; i++)
        digest = (digest ^ ((const uint8_t *)y->data)[i]) * 0x100000001B3u;
    frame_end(frame);
}

static void begin(void) {
    state = 1;
    digest = 0xCBF29CE484222325u;
}

static void print(const char *set, const char *kernel, const char *dtype, const char *range) {
    printf("%s %s %s %s %016llx\n", set, kernel, dtype, range, (unsigned long long)digest);
}

// One block of rows and several; so many that pairs are unpacked.
static const int64_t ROWS[] = {1, 2, 3, 5, 8, 12, 13, 40};
// Steps of 4 bytes (in int8, groups) and columns: less than a run of additions, one, more.
static const int64_t SIZES[][2] = {{1, 1}, {15, 33}, {64, 64}, {129, 97}, {350, 160}};

static void products(const char *set, XLA_FFI_DataType dtype, struct range range) {
    const int64_t numbers = dtype == F32 ? 1 : dtype == BF16 ? 2 : 4;
    for (int i = 0; i < COUNT(ROWS) * COUNT(SIZES); i++) {
        const int64_t rows = ROWS[i % COUNT(ROWS)], *size = SIZES[i / COUNT(ROWS)];
        const int64_t panels = (size[1] + 31) / 32, steps = dtype == S8 ? 8 * size[0] : size[0];
        struct frame frame;
        frame_begin(&frame, set, 4);
        filled(&frame, F32, dtype == BF16 ? 0xFFFF0000 : 0xFFFFFFFF, range, 2,
               (int64_t[]){rows, steps * numbers});
        filled(&frame, dtype, 0xFFFFFFFF, range, 4, (int64_t[]){panels, steps, 32, numbers});
        if (dtype == S8)
            filled(&frame, BF16, 0x7FFFFFFF, range, 3, (int64_t[]){panels, size[0], 32});
        frame_buffer(&frame, F32, AT_END, 2, (int64_t[]){rows, size[1]});
        call(&frame, dtype == S8 ? meshwen_matmul_int8 : meshwen_matmul);
    }
}

// Key/value heads, query heads of each, head_dim, that of the pool, positions of a block, window, and of
// two sequences the length and the tokens.
static const int64_t PAGED[][10] = {
    {2, 7, 64, 64, 32, INT32_MAX, 70, 1, 9, 1},
    {1, 2, 64, 64, 32, INT32_MAX, 40, 40, 1100, 5},
    {2, 1, 40, 64, 96, 300, 1033, 33, 1, 1},
};

static void paged(const char *set, XLA_FFI_DataType dtype) {
    const struct range range = {"", -4, 1};
    for (int i = 0; i < COUNT(PAGED); i++) {
        const int64_t *of = PAGED[i], K = of[0], heads = K * of[1], H = of[3], S = of[4];
        const int64_t N = of[7] + of[9], W = 35, P = 2 * W, one = 1, two = 2, three = 3;
        struct frame frame;
        frame_begin(&frame, set, 4);
        filled(&frame, F32, 0xFFFFFFFF, range, 3, (int64_t[]){N, heads, of[2]});
        filled(&frame, dtype, 0xFFFFFFFF, range, 4, (int64_t[]){P, K, H, S});
        filled(&frame, dtype, 0xFFFFFFFF, range, 4, (int64_t[]){P, K, S, H});
        int32_t *starts = frame_buffer(&frame, S32, AT_END, 1, &three);
        int32_t *lengths = frame_buffer(&frame, S32, AT_END, 1, &two);
        int32_t *tables = frame_buffer(&frame, S32, AT_END, 2, (int64_t[]){2, W});
        starts[0] = 0, starts[1] = (int32_t)of[7], starts[2] = (int32_t)N;
        lengths[0] = (int32_t)of[6], lengths[1] = (int32_t)of[8];
        for (int n = 0; n < P; n++) tables[n] = (int32_t)(P - 1 - n);
        *(int32_t *)frame_buffer(&frame, S32, AT_END, 1, &one) = (int32_t)of[5];
        frame_buffer(&frame, F32, AT_END, 3, (int64_t[]){N, heads, of[2]});
        call(&frame, meshwen_paged_attention);
    }
}

int main(void) {
    pool_start(3);
    for (int i = 0; meshwen_instruction_set(i); i++) {
        if (!meshwen_supported(i)) continue;
        const char *set = meshwen_instruction_set(i);
        const struct {
            const char *name;
            XLA_FFI_DataType dtype;
        } dtypes[] = {{"float32", F32}, {"bfloat16", BF16}, {"int8", S8}};
        for (int d = 0; d < 3; d++)
            for (int r = 0; r < COUNT(RANGES); r++) {
                begin();
                products(set, dtypes[d].dtype, RANGES[r]);
                print(set, "matmul", dtypes[d].name, RANGES[r].name);
            }
        for (int d = 0; d < 2; d++) {
            begin();
            paged(set, dtypes[d].dtype);
            print(set, "paged_attention", dtypes[d].name, "near");
        }
    }
    pool_wait();
    pool_stop();
    return 0;
}
