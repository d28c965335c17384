// SPDX-License-Identifier: Apache-2.0
//
// What entries share: each checks its call, makes a task of it, and has threads do its units.

#ifndef MESHWEN_ENTRIES_H
#define MESHWEN_ENTRIES_H

#include "ffi.h"
#include "instruction_sets.h"

#define F32 XLA_FFI_DataType_F32
#define BF16 XLA_FFI_DataType_BF16
#define S8 XLA_FFI_DataType_S8
#define S32 XLA_FFI_DataType_S32

#define TRY(expression)                                                                              \
    do {                                                                                             \
        error *found = (expression);                                                                 \
        if (found) return found;                                                                     \
    } while (0)

// The kernels that a call asks for, and how many threads may compute.
error *asked(const call *call, const struct instruction_set **set, int64_t *threads);

#endif
