// SPDX-License-Identifier: Apache-2.0

#include "cases.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define COLUMNS 32
#define GROUP 32
#define ROUNDING 0x1p-24 // of float32, relative
#define SMALLEST 0x1p-149

static _Thread_local uint32_t state = 1;

// From -1 to 1, of the 8 bits that bfloat16 has; one of 16 is 0, one of 16 subnormal.
static float random_number(void) {
    state = state * 1664525 + 1013904223;
    const int kind = state >> 28, bits = (int)(state >> 16 & 0xFF) - 128;
    return kind == 0 ? 0.0f : kind == 1 ? (float)bits * 0x1p-133f : (float)bits * 0x1p-7f;
}

static uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

// Number i of a buffer.
static double number(const struct frame *frame, int buffer, int64_t i) {
    const XLA_FFI_Buffer *of = &frame->buffers[buffer];
    if (of->dtype == F32) return ((const float *)of->data)[i];
    if (of->dtype == S8) return ((const int8_t *)of->data)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)of->data)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void put(const struct frame *frame, int buffer, int64_t i, float x) {
    const XLA_FFI_Buffer *of = &frame->buffers[buffer];
    if (of->dtype == F32)
        ((float *)of->data)[i] = x;
    else
        ((uint16_t *)of->data)[i] = to_bfloat16(x);
}

static void *buffer4(struct frame *frame, XLA_FFI_DataType dtype, enum side side, int64_t a,
                     int64_t b, int64_t c, int64_t d) {
    return frame_buffer(frame, dtype, side, 4, (int64_t[]){a, b, c, d});
}

XLA_FFI_Handler *product_entry(struct product of) {
    return of.kind == INT8 ? meshwen_matmul_int8 : meshwen_matmul;
}

static int64_t panels_of(struct product of) { return (of.columns + COLUMNS - 1) / COLUMNS; }
static int64_t numbers_of(struct product of) {
    return of.kind == FLOAT32 ? 1 : of.kind == INT8 ? 4 : 2;
}
static int64_t steps_of(struct product of) { return of.kind == INT8 ? 8 * of.steps : of.steps; }

// Where b has element k of a column.
static int64_t place(struct product of, int64_t k, int64_t column) {
    const int64_t numbers = numbers_of(of), steps = steps_of(of);
    const int64_t step = column / COLUMNS * steps + k / numbers;
    return (step * COLUMNS + column % COLUMNS) * numbers + k % numbers;
}

void product_frame(struct frame *frame, struct product of, enum side side) {
    const int64_t numbers = numbers_of(of), steps = steps_of(of), inner = steps * numbers;
    const XLA_FFI_DataType dtype = of.kind == FLOAT32 ? F32 : of.kind == INT8 ? S8 : BF16;
    state = (uint32_t)(of.rows * 7 + of.steps * 31 + of.columns);
    frame_buffer(frame, of.kind == DOT ? BF16 : F32, side, 2, (int64_t[]){of.rows, inner});
    for (int64_t i = 0; i < of.rows * inner; i++)
        put(frame, 0, i, random_number() * (of.tiny ? 0x1p-126f : 1.0f));
    int8_t *b = buffer4(frame, dtype, side, panels_of(of), steps, COLUMNS, numbers);
    for (int64_t column = 0; column < of.columns; column++) // Behind them NaN stays.
        for (int64_t k = 0; k < inner; k++) {
            if (of.kind == INT8)
                b[place(of, k, column)] = (int8_t)((state = state * 1664525 + 1013904223) >> 24);
            else
                put(frame, 1, place(of, k, column), random_number());
        }
    if (of.kind == INT8) {
        frame_buffer(frame, BF16, side, 3, (int64_t[]){panels_of(of), of.steps, COLUMNS});
        for (int64_t i = 0; i < panels_of(of) * of.steps * COLUMNS; i++)
            put(frame, 2, i, random_number());
    }
    frame_buffer(frame, F32, side, 2, (int64_t[]){of.rows, of.columns});
    frame_ready(frame);
}

struct sum {
    double value, sizes; // and the sum of absolute values
};

static struct sum dot_product(const struct frame *frame, struct product of, int64_t row,
                              int64_t column) {
    const int64_t inner = steps_of(of) * numbers_of(of);
    struct sum sum = {0, 0};
    for (int64_t k = 0; k < inner; k++) {
        const double product =
            number(frame, 0, row * inner + k) * number(frame, 1, place(of, k, column));
        sum.value += product;
        sum.sizes += fabs(product);
    }
    return sum;
}

// As the row is quantised: groups of 32 numbers share a scale, the largest of them over 127.
static struct sum quantised_product(const struct frame *frame, struct product of, int64_t row,
                                    int64_t column) {
    const float *a = (const float *)frame->buffers[0].data + row * of.steps * GROUP;
    struct sum sum = {0, 0};
    for (int64_t g = 0; g < of.steps; g++) {
        float largest = 0;
        for (int i = 0; i < GROUP; i++) largest = fmaxf(largest, fabsf(a[g * GROUP + i]));
        const float inverse = largest > 0x1p-120f ? 127.0f / largest : 0.0f;
        double products = 0;
        for (int i = 0; i < GROUP; i++)
            products += (double)rintf(a[g * GROUP + i] * inverse) *
                        number(frame, 1, place(of, g * GROUP + i, column));
        const int64_t scale = ((column / COLUMNS) * of.steps + g) * COLUMNS + column % COLUMNS;
        products *= (double)(largest / 127.0f) * number(frame, 2, scale);
        sum.value += products;
        sum.sizes += fabs(products);
    }
    return sum;
}

void product_check(const struct frame *frame, struct product of) {
    // Each addition rounds once, and products once more that an instruction or a scale rounds.
    const double roundings = 2.0 * (double)(steps_of(of) * numbers_of(of)) + 3;
    // The instruction for dot products takes subnormal numbers for zeros, and gives zeros for them.
    const double smallest = of.kind == DOT ? FLT_MIN : SMALLEST;
    const XLA_FFI_Buffer *y = &frame->buffers[frame->count - 1];
    for (int64_t row = 0; row < of.rows; row++)
        for (int64_t column = 0; column < of.columns; column++) {
            const double found = ((const float *)y->data)[row * of.columns + column];
            const struct sum sum = of.kind == INT8 ? quantised_product(frame, of, row, column)
                                                   : dot_product(frame, of, row, column);
            const double bound = roundings * (ROUNDING * sum.sizes + smallest);
            CHECK(fabs(found - sum.value) <= bound, "y[%d, %d] is %g, not %g", (int)row,
                  (int)column, found, sum.value);
        }
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A row of queries, and the positions that it sees. The first three buffers of a frame are queries, keys
// and values, the last is the result.
struct row {
    int64_t query;            // place of its first number
    int64_t k, K, h, H, S;    // key/value head, of how many; dimensions, of how many; positions of a block
    const int32_t *table;     // blocks
    int64_t first, last;
};

// Where the number of a position and dimension is, of keys and of values.
static int64_t key_place(const struct row *row, int64_t s, int64_t h) {
    return ((row->table[s / row->S] * row->K + row->k) * row->H + h) * row->S + s % row->S;
}
static int64_t value_place(const struct row *row, int64_t s, int64_t h) {
    return ((row->table[s / row->S] * row->K + row->k) * row->S + s % row->S) * row->H + h;
}

// A row's attention, and the bound on its errors.
static void check_row(const struct frame *frame, struct row row) {
    double scores[4096], largest = -DBL_MAX, error = 0, weights = 0;
    const int64_t first = row.first, last = row.last;
    CHECK(last < 4096, "no room for %d scores", (int)last);
    for (int64_t s = first; s <= last; s++) {
        double sizes = scores[s] = 0;
        for (int64_t h = 0; h < row.h; h++) {
            const double product = number(frame, 0, row.query + h) * number(frame, 1, key_place(&row, s, h));
            scores[s] += product;
            sizes += fabs(product);
        }
        largest = fmax(largest, scores[s]);
        error = fmax(error, (double)(row.h + 2) * ROUNDING * sizes);
    }
    for (int64_t s = first; s <= last; s++) weights += exp(scores[s] - largest);
    for (int64_t h = 0; h < row.h; h++) {
        double sum = 0, sizes = 0;
        for (int64_t s = first; s <= last; s++) {
            const double product =
                exp(scores[s] - largest) / weights * number(frame, 2, value_place(&row, s, h));
            sum += product;
            sizes += fabs(product);
        }
        // A score's error is its weight's, relative, and once more that of their sum; then
        // exponentials, a few roundings of each and of the largest, and the additions.
        const double bound =
            sizes * (2 * error + (double)(2 * (last - first) + 64) * ROUNDING) + SMALLEST;
        const double found = number(frame, frame->count - 1, row.query + h);
        CHECK(fabs(found - sum) <= bound, "y[%d] is %.9g, not %.9g", (int)(row.query + h), found, sum);
    }
}

void paged_frame(struct frame *frame, struct paged of, enum side side) {
    int64_t N = 2, W = 1; // Two tokens are of no sequence.
    for (int r = 0; r < SEQUENCES; r++) {
        N += of.tokens[r];
        W = larger(W, of.lengths[r] / of.S + 2);
    }
    const int64_t R = SEQUENCES, P = R * W, heads = of.K * of.G, starts_count = R + 1, one = 1;
    state = (uint32_t)(N * 3 + heads * 5 + of.h * 7 + of.S * 11);
    frame_buffer(frame, F32, side, 3, (int64_t[]){N, heads, of.h});
    for (int64_t i = 0; i < N * heads * of.h; i++) put(frame, 0, i, random_number());
    buffer4(frame, of.dtype, side, P, of.K, of.H, of.S);
    buffer4(frame, of.dtype, side, P, of.K, of.S, of.H);
    int32_t *starts = frame_buffer(frame, S32, side, 1, &starts_count);
    int32_t *lengths = frame_buffer(frame, S32, side, 1, &R);
    int32_t *tables = frame_buffer(frame, S32, side, 2, (int64_t[]){R, W}); // -1 where nothing is needed
    starts[0] = 0;
    for (int64_t r = 0; r < R; r++) {
        starts[r + 1] = starts[r] + (int32_t)of.tokens[r];
        lengths[r] = (int32_t)of.lengths[r];
        if (!of.tokens[r]) continue;
        for (int64_t s = larger(of.lengths[r] - of.tokens[r] + 1 - of.window, 0); s < of.lengths[r]; s++) {
            tables[r * W + s / of.S] = (int32_t)(P - 1 - (s / of.S * R + r));
            for (int64_t i = 0; i < of.K * of.h; i++) { // All that no token sees stays NaN.
                const int64_t k = i / of.h, h = i % of.h;
                const struct row row = {0, k, of.K, of.h, of.H, of.S, tables + r * W, 0, 0};
                put(frame, 1, key_place(&row, s, h), random_number());
                put(frame, 2, value_place(&row, s, h), random_number());
            }
        }
    }
    *(int32_t *)frame_buffer(frame, S32, side, 1, &one) = (int32_t)of.window;
    frame_buffer(frame, F32, side, 3, (int64_t[]){N, heads, of.h});
    frame_ready(frame);
}

void paged_check(const struct frame *frame, struct paged of) {
    const int64_t heads = of.K * of.G, W = frame->dims[5][1], N = frame->dims[0][0];
    const int32_t *tables = frame->buffers[5].data;
    int64_t n = 0;
    for (int64_t r = 0; r < SEQUENCES; r++)
        for (int64_t t = 0; t < of.tokens[r]; t++, n++)
            for (int64_t head = 0; head < heads; head++) {
                const int64_t last = of.lengths[r] - of.tokens[r] + t;
                const int64_t first = larger(last + 1 - of.window, 0);
                check_row(frame, (struct row){(n * heads + head) * of.h, head / of.G, of.K, of.h, of.H,
                                              of.S, tables + r * W, first, last});
            }
    for (int64_t i = n * heads * of.h; i < N * heads * of.h; i++)
        CHECK(number(frame, 7, i) == 0, "a token of no sequence has y[%d] = %g", (int)i, number(frame, 7, i));
}

void writes_frame(struct frame *frame, struct writes of, enum side side) {
    state = (uint32_t)(of.N * 3 + of.K * 5 + of.h * 7 + of.S);
    frame->in_place = 2;
    buffer4(frame, of.dtype, side, of.P, of.K, of.H, of.S);
    buffer4(frame, of.dtype, side, of.P, of.K, of.S, of.H);
    for (int n = 2; n < 4; n++) {
        frame_buffer(frame, of.dtype, side, 3, (int64_t[]){of.N, of.K, of.h});
        for (int64_t i = 0; i < of.N * of.K * of.h; i++) put(frame, n, i, random_number());
    }
    int32_t *slots = frame_buffer(frame, S32, side, 1, &of.N);
    for (int64_t n = 0; n < of.N; n++)
        slots[n] = n % 5 == 3 ? -1 : (int32_t)(of.P * of.S - 1 - n * 7 % (of.P * of.S));
    frame_ready(frame);
}

// Every number of the pool: of the last token that was written there, or as it was.
void writes_check(const struct frame *frame, struct writes of) {
    const int32_t *slots = frame->buffers[4].data;
    for (int64_t slot = 0; slot < of.P * of.S; slot++) {
        int64_t token = -1;
        for (int64_t n = 0; n < of.N; n++)
            if (slots[n] == slot) token = n;
        const int32_t block = (int32_t)(slot / of.S);
        for (int64_t i = 0; i < of.K * of.H; i++) {
            const int64_t k = i / of.H, h = i % of.H, from = (token * of.K + k) * of.h + h;
            const struct row row = {0, k, of.K, of.h, of.H, of.S, &block, 0, 0};
            for (int n = 0; n < 2; n++) {
                const int64_t place = n ? value_place(&row, slot % of.S, h) : key_place(&row, slot % of.S, h);
                const double found = number(frame, n, place);
                const double expected = h < of.h && token >= 0 ? number(frame, 2 + n, from) : 0;
                CHECK(token < 0 ? isnan(found) : found == expected, "slot %d, dimension %d: %g",
                      (int)slot, (int)i, found);
            }
        }
    }
}

static const char *const kinds[KINDS] = {"float32", "float32 and bfloat16", "bfloat16", "int8"};

void run_product(const char *set, int64_t threads, struct product of, enum side side) {
    at("%s, %s, %d threads: [%d, %d steps] to %d columns, guarded at %s", set, kinds[of.kind],
       (int)threads, (int)of.rows, (int)of.steps, (int)of.columns, side ? "the begin" : "the end");
    struct frame frame;
    frame_begin(&frame, set, threads);
    product_frame(&frame, of, side);
    const XLA_FFI_Error *error = frame_call(&frame, product_entry(of));
    CHECK(!error, "refused: %s", error->message);
    product_check(&frame, of);
    frame_end(&frame);
}

void run_paged(const char *set, int64_t threads, struct paged of, enum side side) {
    at("%s, %s, %d threads: paged K %d G %d h %d H %d S %d window %d, %d of %d, %d of %d, %d of %d, guarded "
       "at %s",
       set, of.dtype == F32 ? "float32" : "bfloat16", (int)threads, (int)of.K, (int)of.G, (int)of.h,
       (int)of.H, (int)of.S, (int)of.window, (int)of.tokens[0], (int)of.lengths[0], (int)of.tokens[1],
       (int)of.lengths[1], (int)of.tokens[2], (int)of.lengths[2], side ? "the begin" : "the end");
    struct frame frame;
    frame_begin(&frame, set, threads);
    paged_frame(&frame, of, side);
    const XLA_FFI_Error *error = frame_call(&frame, meshwen_paged_attention);
    CHECK(!error, "refused: %s", error->message);
    paged_check(&frame, of);
    frame_end(&frame);
}

void run_writes(const char *set, int64_t threads, struct writes of, enum side side) {
    at("%s, %s, %d threads: writes P %d K %d h %d H %d S %d N %d, guarded at %s", set,
       of.dtype == F32 ? "float32" : "bfloat16", (int)threads, (int)of.P, (int)of.K, (int)of.h,
       (int)of.H, (int)of.S, (int)of.N, side ? "the begin" : "the end");
    struct frame frame;
    frame_begin(&frame, set, threads);
    writes_frame(&frame, of, side);
    const XLA_FFI_Error *error = frame_call(&frame, meshwen_write_cache);
    CHECK(!error, "refused: %s", error->message);
    writes_check(&frame, of);
    frame_end(&frame);
}

void with_each_set(void (*function)(const char *set, int has_bf16_dot)) {
    for (int i = 0; meshwen_instruction_set(i); i++)
        if (meshwen_supported(i))
            function(meshwen_instruction_set(i), meshwen_has_bf16_dot(i));
}
