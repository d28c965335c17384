// SPDX-License-Identifier: Apache-2.0
//
// An array whose memory nobody wrote, so that it is resident only where it is written later.

#define _GNU_SOURCE

#include "entries.h"
#include "exported.h"

#if defined(__linux__)
#include <sys/mman.h>

#define HUGE ((uintptr_t)1 << 21)

// Large pages take fewer entries of the TLB, where blocks are read that are far from one another.
static void advise(const buffer *buffer, int64_t bytes) {
    const uintptr_t begin = ((uintptr_t)buffer->data + HUGE - 1) / HUGE * HUGE;
    const uintptr_t end = ((uintptr_t)buffer->data + (uintptr_t)bytes) / HUGE * HUGE;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE); // Else pages are small.
}
#else
static void advise(const buffer *buffer, int64_t bytes) { (void)buffer, (void)bytes; }
#endif

// Leaves its result, of any dtype and sizes, as the memory is.
EXPORTED error *meshwen_unwritten(call *call) {
    if (described(call)) return 0;
    TRY(counted(call, 0, 1));
    const buffer *buffer = result(call, 0);
    int64_t bytes = buffer->dtype == F32 ? 4 : buffer->dtype == BF16 ? 2 : 1; // at least
    for (int64_t i = 0; i < buffer->rank; i++) bytes *= buffer->dims[i];
    advise(buffer, bytes);
    return 0;
}
