// SPDX-License-Identifier: Apache-2.0
//
// The vector operations that the kernels are made of, over LANES float32 numbers.
//
// Vectors are those of GCC and clang: +, -, *, / and comparisons work on them as they are. What they
// lack, a multiply-add that rounds once and the dot products of an instruction set, is chosen here by
// the macros that the compiler defines for the target. The sources are compiled with
// -ffp-contract=off: a multiplication and an addition are one operation only where `fused` says so.

#ifndef MESHWEN_VEC_H
#define MESHWEN_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// LANES: float32 numbers of a vector. MR, as in BLIS: rows of a block, whose sums (rows times vectors
// of 32 columns) fit into the registers. WIDENED_MR: where bfloat16 is widened on the way, which takes
// a register more and twice as many numbers of a. PAIRED_MR: up to how many rows take two panels at
// once, as memory is read faster in two places than in one. INT8_MR: rows of int8 blocks.
#if defined(MESHWEN_LANES) // What another instruction set's vectors do, for tests on any processor.
#define LANES MESHWEN_LANES
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#if LANES == 16
#define MR 12
#define WIDENED_MR 12
#define PAIRED_MR 6
#define INT8_MR 6
#define INT8_NR 32
#elif LANES == 8
#define MR 3
#define WIDENED_MR 2
#define PAIRED_MR 1
#define INT8_MR 3
#define INT8_NR 32
#else // NEON has 32 registers; eight of them are 32 columns.
#define MR 3
#define WIDENED_MR 3
#define PAIRED_MR 1
#define INT8_MR 3
#define INT8_NR 16
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1")
#endif

INLINE floats load(const void *at) {
    floats x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE void store(void *at, floats x) { memcpy(at, &x, sizeof x); }

INLINE words load_bits(const void *at) {
    words x;
    memcpy(&x, at, sizeof x);
    return x;
}

// A number in every lane. Written this way, not lane by lane, it is one instruction with GCC too; less
// zero it keeps every bit, that of -0.0 too.
INLINE words all_bits(uint32_t x) { return x - (words){0}; }
INLINE floats all(float x) { return x - (floats){0}; }

// LANES bfloat16 numbers as float32.
INLINE floats load_bfloat16(const void *at) {
    halves x;
    memcpy(&x, at, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

// The lower and the upper bfloat16 of each pair as float32.
INLINE floats lower(words pairs) { return (floats)(pairs << 16); }
INLINE floats upper(words pairs) { return (floats)(pairs & 0xFFFF0000u); }

// Where `mask` is -1 a, where it is 0 b.
INLINE floats blend(ints mask, floats a, floats b) {
    return (floats)(((ints)a & mask) | ((ints)b & ~mask));
}

// a b + c, rounded once.
INLINE floats fused(floats a, floats b, floats c) {
#if LANES == 16 && defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__AVX2__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif LANES == 4 && defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    UNROLL for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

#endif
