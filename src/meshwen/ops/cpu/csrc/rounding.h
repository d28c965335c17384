// SPDX-License-Identifier: Apache-2.0
//
// The floating-point mode that kernels compute in: to the nearest, ties to even, and subnormal numbers
// kept, on every processor. XLA's threads may have another, which is put back.

#ifndef MESHWEN_ROUNDING_H
#define MESHWEN_ROUNDING_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>

struct rounding {
    unsigned int control;
};

static inline struct rounding round_to_nearest(void) {
    struct rounding before = {_mm_getcsr()};
    _mm_setcsr(0x1F80); // exceptions masked
    return before;
}

static inline void restore(struct rounding before) { _mm_setcsr(before.control); }

#elif defined(__aarch64__)

struct rounding {
    uint64_t control;
};

static inline struct rounding round_to_nearest(void) {
    struct rounding before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before.control));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return before;
}

static inline void restore(struct rounding before) {
    __asm__ volatile("msr fpcr, %0" : : "r"(before.control));
}

#else

struct rounding {
    int unused;
};

static inline struct rounding round_to_nearest(void) { return (struct rounding){0}; }
static inline void restore(struct rounding before) { (void)before; }

#endif

#endif
