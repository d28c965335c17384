// SPDX-License-Identifier: Apache-2.0
//
// Memory that faults where it is read or written outside of, and what `malloc` is for the kernels.

#ifndef GUARDED_H
#define GUARDED_H

#include <stdatomic.h>
#include <stddef.h>

// Which end of a block touches a page that may not be read. The rest of the other page has canaries.
enum side { AT_END, AT_BEGIN, SIDES };

struct guarded {
    char *map, *data;
    size_t map_bytes, bytes;
};

// A block whose bytes are all 0xFF: NaN as float32 and as bfloat16, and no row of a cache.
struct guarded guarded(size_t bytes, enum side side);
// From now on it may be read only; or written again.
void protect(const struct guarded *block);
void unprotect(const struct guarded *block);
// Whether the canaries are as they were.
int intact(const struct guarded *block);
void drop(struct guarded *block);

// `malloc` and `free`, which the linker puts in place of libc's (--wrap). Blocks are guarded.
extern _Atomic long allocations;       // since the program began
extern _Atomic long allocated;         // blocks that were not freed
extern _Atomic long failing_allocation; // counted down by each; at 1 it returns NULL. 0: none does

// Prints what was wrong, for which case, and ends the program.
_Noreturn void fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
// What the thread is at, for `fail`.
void at(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) fail(__FILE__, __LINE__, __VA_ARGS__);                                   \
    } while (0)

#endif
