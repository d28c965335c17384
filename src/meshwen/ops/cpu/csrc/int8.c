// SPDX-License-Identifier: Apache-2.0
//
// y = a b, of an a that is quantised here and a quantised b. Compiled once for each instruction set that
// multiplies bytes; SUFFIX is its name.
//
// First a is quantised, by the same rule as b: groups of 32 numbers share a scale. Then each panel of b,
// which lies in memory as it is read, is multiplied with some rows of a at a time. Sums within a group
// are of integers, and exact: 32 products of at most 127 x 127. Groups are added up in float32, one
// behind the other.

#include "kernels.h"
#include "panels.h"
#include "vec.h"

#define JOINED(name, suffix) name##_##suffix
#define NAMED(name, suffix) JOINED(name, suffix)

typedef int8_t bytes __attribute__((vector_size(4 * LANES)));

#define VECTORS (INT8_NR / LANES)

// Some instructions multiply unsigned with signed bytes: b gets 128 added then, and sums begin with what
// that is too much.
#if (LANES == 16 && defined(__AVX512VNNI__)) || (LANES == 8 && defined(__AVXVNNI__)) ||               \
    defined(MESHWEN_UNSIGNED) // in tests, on any processor
#define UNSIGNED 1
#else
#define UNSIGNED 0
#endif

INLINE bytes load_bytes(const int8_t *at) {
    bytes x;
    memcpy(&x, at, sizeof x);
    return x;
}

// What the instruction takes of a vector of b.
INLINE bytes operand(bytes b) { return UNSIGNED ? b ^ (int8_t)-128 : b; }

// Adds the 4 products of bytes of each lane.
INLINE ints dot(ints sum, bytes b, bytes a) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
#elif LANES == 8 && defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)b, (__m256i)a);
#elif LANES == 8 && defined(__AVX2__) && !UNSIGNED
    // Two products are added in 16 bits: b loses its sign, which a gets, so that they do not overflow.
    __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)b),
                                       _mm256_sign_epi8((__m256i)a, (__m256i)b));
    return sum + (ints)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
#elif LANES == 4 && defined(__ARM_FEATURE_DOTPROD)
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)b, (int8x16_t)a);
#elif LANES == 4 && defined(__aarch64__)
    int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)b), vget_low_s8((int8x16_t)a));
    int16x8_t high = vmull_high_s8((int8x16_t)b, (int8x16_t)a);
    return sum + (ints)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
    UNROLL for (int above = 24; above >= 0; above -= 8) { // bits above one of a lane's bytes
        words left = (words)b << above, right = (words)a << above;
        sum += (UNSIGNED ? (ints)(left >> 24) : (ints)left >> 24) * ((ints)right >> 24);
    }
    return sum;
#endif
}

// Quantises some rows. Numbers that are not finite have a scale that is not, and count as zeros: so
// results are NaN.
static int quantise(const void *task, int64_t unit) {
    const struct int8_matmul *m = task;
    const int64_t first = unit * m->unit_rows, last = smaller(first + m->unit_rows, m->rows);
    for (int64_t g = first * m->groups; g < last * m->groups; g++) {
        const float *numbers = m->a + g * GROUP;
        words largest_bits = all_bits(0);
        for (int i = 0; i < GROUP; i += LANES) {
            words size = load_bits(numbers + i) & 0x7FFFFFFFu;
            words more = (words)(size > largest_bits);
            largest_bits = (size & more) | (largest_bits & ~more);
        }
        uint32_t bits = 0;
        UNROLL for (int i = 0; i < LANES; i++) bits = largest_bits[i] > bits ? largest_bits[i] : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        // Of smaller ones the inverse may be infinite: they become zeros.
        const int counts = largest > 0x1p-120f && bits < 0x7F800000u;
        const float inverse = counts ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        int8_t *to = m->quantised + g * GROUP;
        for (int i = 0; i < GROUP; i += LANES) {
            // 1.5 * 2^23, added, rounds to an integer, which is in the lowest bits then.
            floats shifted = load(numbers + i) * all(inverse) + all(0x1.8p23f);
            UNROLL for (int n = 0; n < LANES; n++) {
                const int8_t value = counts ? (int8_t)((words)shifted)[n] : 0;
                to[i + n] = value;
                sum += value;
            }
        }
        m->a_scales[g] = largest / 127.0f;
        m->corrections[g] = UNSIGNED ? -128 * sum : 0;
    }
    return 1;
}

// The columns from `column` of a panel, of so many rows.
INLINE void multiply_rows(int rows, int prefetches, const struct int8_matmul *m, int64_t row,
                          const int8_t *b, const uint16_t *b_scales, float *y, int64_t y_stride) {
    const int64_t groups = m->groups;
    const int8_t *a = m->quantised + row * groups * GROUP;
    const float *a_scales = m->a_scales + row * groups;
    const int32_t *corrections = m->corrections + row * groups;
    floats totals[INT8_MR][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int n = 0; n < VECTORS; n++) totals[i][n] = all(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        ints sums[INT8_MR][VECTORS];
        // One row waits for memory alone, where processors do not look ahead themselves: a page on.
        if (prefetches)
            UNROLL for (int line = 0; line < GROUP * COLUMNS / 64; line++)
                __builtin_prefetch(b + 4096 + 64 * line, 0, 2);
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int n = 0; n < VECTORS; n++)
                sums[i][n] = (ints)all_bits((uint32_t)corrections[i * groups + g]);
        // With 16 registers two steps at a time: of more, a compiler interleaves loads, and spills sums.
        const int together = rows > 1 && LANES == 8 ? 2 : GROUP_STEPS;
        ROLLED for (int first = 0; first < GROUP_STEPS; first += together) {
            UNROLL for (int s = first; s < first + together; s++) {
                UNROLL for (int n = 0; n < VECTORS; n++) {
                    bytes column = operand(load_bytes(b + s * STEP_BYTES + 4 * LANES * n));
                    UNROLL for (int i = 0; i < rows; i++) {
                        uint32_t some;
                        memcpy(&some, a + (i * groups + g) * GROUP + s * STEP, sizeof some);
                        sums[i][n] = dot(sums[i][n], column, (bytes)all_bits(some));
                    }
                }
            }
        }
        UNROLL for (int n = 0; n < VECTORS; n++) {
            floats scales = load_bfloat16(b_scales + LANES * n);
            UNROLL for (int i = 0; i < rows; i++) {
                floats scaled = __builtin_convertvector(sums[i][n], floats) * scales;
                totals[i][n] = fused(scaled, all(a_scales[i * groups + g]), totals[i][n]);
            }
        }
        b += GROUP * COLUMNS;
        b_scales += COLUMNS;
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int n = 0; n < VECTORS; n++) store(y + i * y_stride + LANES * n, totals[i][n]);
}

static void multiply_block(int64_t rows, const struct int8_matmul *m, int64_t row, const int8_t *b,
                           const uint16_t *b_scales, float *y, int64_t y_stride) {
    for (int c = 0; c < COLUMNS; c += INT8_NR, b += STEP * INT8_NR,
             b_scales += INT8_NR, y += INT8_NR) {
        switch (rows) {
#define OF_ROWS(count)                                                                               \
    case count:                                                                                      \
        multiply_rows(count <= INT8_MR ? count : 1, count == 1, m, row, b, b_scales, y, y_stride); \
        break;
            OF_ROWS(1)
            OF_ROWS(2)
            OF_ROWS(3)
            OF_ROWS(4)
            OF_ROWS(5)
            OF_ROWS(6)
        }
    }
}

// Multiplies some panels with all rows.
static int multiply_panels(const void *task, int64_t unit) {
    const struct int8_matmul *m = task;
    const int64_t first = unit * m->unit_panels, panels = quotient_up(m->columns, COLUMNS);
    const int64_t last = smaller(first + m->unit_panels, panels);
    const int64_t blocks = quotient_up(m->rows, INT8_MR);
    float part[INT8_MR * COLUMNS];
    for (int64_t p = first; p < last; p++) {
        const int8_t *b = m->b + p * m->groups * GROUP * COLUMNS;
        const uint16_t *b_scales = m->b_scales + p * m->groups * COLUMNS;
        const int64_t columns = smaller(m->columns - p * COLUMNS, COLUMNS);
        for (int64_t block = 0, row = 0; block < blocks; block++) {
            const int64_t rows = quotient_up(m->rows - row, blocks - block);
            float *y = m->y + row * m->columns + p * COLUMNS;
            if (columns == COLUMNS) {
                multiply_block(rows, m, row, b, b_scales, y, m->columns);
            } else { // The last panel has fewer columns.
                multiply_block(rows, m, row, b, b_scales, part, COLUMNS);
                for (int64_t i = 0; i < rows; i++)
                    memcpy(y + i * m->columns, part + i * COLUMNS, columns * sizeof(float));
            }
            row += rows;
        }
    }
    return 1;
}

const struct int8_kernels NAMED(int8_kernels, SUFFIX) = {quantise, multiply_panels};
