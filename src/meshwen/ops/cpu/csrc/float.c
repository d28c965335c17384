// SPDX-License-Identifier: Apache-2.0
//
// Matmuls and attention of float32 and bfloat16. Compiled once for each instruction set; SUFFIX is its
// name. With MESHWEN_DOT it has an instruction for dot products of bfloat16.

#include "kernels.h"
#include "matmul.h"
#include "paged.h"
#include "tile.h"

#define JOINED(name, suffix) name##_##suffix
#define NAMED(name, suffix) JOINED(name, suffix)

#define MATMUL(kind)                                                                                 \
    static int matmul_##kind(const void *task, int64_t unit) {                                       \
        return multiply_panels(kind, tiles_##kind, paired_##kind, task, unit);                       \
    }
#define ATTENTION(kind)                                                                              \
    static const struct attending attending_##kind = {score_##kind, add_##kind};                     \
    static int paged_##kind(const void *task, int64_t unit) {                                        \
        return attend_tokens(kind, &attending_##kind, task, unit);                                   \
    }

MATMUL(FLOAT32)
MATMUL(WIDENED)
ATTENTION(FLOAT32)
ATTENTION(CACHED)
#if defined(MESHWEN_DOT)
MATMUL(DOT)
#endif

const struct float_kernels NAMED(float_kernels, SUFFIX) = {
    .matmul_float32 = matmul_FLOAT32,
    .matmul_widened = matmul_WIDENED,
#if defined(MESHWEN_DOT)
    .matmul_dot = matmul_DOT,
#endif
    .paged_float32 = paged_FLOAT32,
    .paged_bfloat16 = paged_CACHED,
};
