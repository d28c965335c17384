// SPDX-License-Identifier: Apache-2.0

#include "instruction_sets.h"

#include <stdatomic.h>
#include <string.h>

static int always(void) { return 1; }

#if defined(MESHWEN_PORTABLE) // and nothing else
#elif defined(__x86_64__)
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

static int bit(unsigned leaf, unsigned subleaf, int word, int number) {
    unsigned words[4];
    if (!__get_cpuid_count(leaf, subleaf, &words[0], &words[1], &words[2], &words[3])) return 0;
    return words[word] >> number & 1;
}

// Whether the system saves the registers of these bits of XCR0.
static int saved(unsigned bits) {
    unsigned low, high;
    if (!bit(1, 0, ECX, 27)) return 0; // OSXSAVE
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

static int avx2(void) { return saved(0x06) && bit(7, 0, EBX, 5) && bit(1, 0, ECX, 12); } // and FMA
static int avx_vnni(void) { return avx2() && bit(7, 1, EAX, 4); }
// F, DQ, BW and VL, as every processor has that has VNNI or BF16, and all since Skylake-X.
static int avx512(void) {
    return avx2() && saved(0xE6) && bit(7, 0, EBX, 16) && bit(7, 0, EBX, 17) && bit(7, 0, EBX, 30) &&
           bit(7, 0, EBX, 31);
}
static int avx512_vnni(void) { return avx512() && bit(7, 0, ECX, 11); }
static int avx512_bf16(void) { return avx512_vnni() && bit(7, 1, EAX, 5); }

extern const struct float_kernels float_kernels_avx512_bf16, float_kernels_avx512, float_kernels_avx2;
extern const struct int8_kernels int8_kernels_avx512_vnni, int8_kernels_avx_vnni, int8_kernels_avx2;

#elif defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
static int neon_dot(void) { return getauxval(AT_HWCAP) >> 20 & 1; }                // ASIMDDP
static int neon_bf16(void) { return neon_dot() && getauxval(AT_HWCAP2) >> 14 & 1; } // BF16
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, 0, 0) && value;
}
static int neon_dot(void) { return feature("hw.optional.arm.FEAT_DotProd"); }
static int neon_bf16(void) { return neon_dot() && feature("hw.optional.arm.FEAT_BF16"); }
#else
static int neon_dot(void) { return 0; }
static int neon_bf16(void) { return 0; }
#endif

extern const struct float_kernels float_kernels_neon_bf16, float_kernels_neon;
extern const struct int8_kernels int8_kernels_neon_dot, int8_kernels_neon;

#endif

extern const struct float_kernels float_kernels_portable;
extern const struct int8_kernels int8_kernels_portable;

const struct instruction_set instruction_sets[] = {
#if defined(MESHWEN_PORTABLE) // and nothing else
#elif defined(__x86_64__)
    {"avx512_bf16", avx512_bf16, &float_kernels_avx512_bf16, &int8_kernels_avx512_vnni},
    {"avx512_vnni", avx512_vnni, &float_kernels_avx512, &int8_kernels_avx512_vnni},
    {"avx512", avx512, &float_kernels_avx512, &int8_kernels_avx2},
    {"avx_vnni", avx_vnni, &float_kernels_avx2, &int8_kernels_avx_vnni},
    {"avx2", avx2, &float_kernels_avx2, &int8_kernels_avx2},
#elif defined(__aarch64__)
    {"neon_bf16", neon_bf16, &float_kernels_neon_bf16, &int8_kernels_neon_dot},
    {"neon_dot", neon_dot, &float_kernels_neon, &int8_kernels_neon_dot},
    {"neon", always, &float_kernels_neon, &int8_kernels_neon},
#endif
    {"portable", always, &float_kernels_portable, &int8_kernels_portable},
};
const int instruction_set_count = sizeof instruction_sets / sizeof *instruction_sets;

// Whether the compiler knew its instructions: see `build` of scripts/build_kernels.py.
static int compiled(const struct instruction_set *set) {
    return set->floats->matmul_float32 && set->int8->matmul;
}

int supported(int number) {
    // Asked once: on a virtual machine the question takes longer than a small matmul.
    static _Atomic signed char known[sizeof instruction_sets / sizeof *instruction_sets];
    const struct instruction_set *set = instruction_sets + number;
    if (!known[number]) known[number] = set->asked() && compiled(set) ? 1 : -1;
    return known[number] > 0;
}

const struct instruction_set *instruction_set(const char *name) {
    for (int i = 0; i < instruction_set_count; i++)
        if (!strcmp(instruction_sets[i].name, name)) return supported(i) ? instruction_sets + i : 0;
    return 0;
}
