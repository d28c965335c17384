// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "guarded.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define CANARY 0xA5
#define LINE ((size_t)64)

_Atomic long allocations, allocated, failing_allocation;
static _Thread_local char place[300];

void at(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(place, sizeof place, format, arguments);
    va_end(arguments);
}

void fail(const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n  in %s\n", place);
    va_end(arguments);
    _exit(1);
}

static size_t whole(size_t bytes, size_t of) { return (bytes + of - 1) / of * of; }

// A page that may not be read, `bytes` in whole pages, and another such page.
static char *mapped(size_t bytes) {
    char *map = mmap(0, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED, "no memory for a block of %zu bytes", bytes);
    CHECK(!bytes || !mprotect(map + PAGE, bytes, PROT_READ | PROT_WRITE), "mprotect failed");
    return map;
}

struct guarded guarded(size_t bytes, enum side side) {
    const size_t pages = whole(bytes, PAGE);
    char *map = mapped(pages);
    struct guarded block = {.map = map, .map_bytes = pages + 2 * PAGE, .bytes = bytes};
    block.data = side == AT_END ? map + PAGE + pages - bytes : map + PAGE;
    memset(map + PAGE, CANARY, pages);
    memset(block.data, 0xFF, bytes);
    return block;
}

void protect(const struct guarded *block) {
    if (block->bytes) mprotect(block->map + PAGE, block->map_bytes - 2 * PAGE, PROT_READ);
}

void unprotect(const struct guarded *block) {
    if (block->bytes)
        mprotect(block->map + PAGE, block->map_bytes - 2 * PAGE, PROT_READ | PROT_WRITE);
}

int intact(const struct guarded *block) {
    const char *end = block->map + block->map_bytes - PAGE;
    for (const char *at = block->map + PAGE; at < end; at++) {
        if (at == block->data) at += block->bytes;
        if (at < end && *(const unsigned char *)at != CANARY) return 0;
    }
    return 1;
}

void drop(struct guarded *block) {
    munmap(block->map, block->map_bytes);
    *block = (struct guarded){0};
}

// A block of `malloc`: a page for `struct guarded`, then pages with the block at their end, which is
// aligned to a cache line as few bytes before the guard page as that allows.
void *__wrap_malloc(size_t bytes) {
    allocations++;
    long left = failing_allocation;
    while (left > 0 && !atomic_compare_exchange_weak(&failing_allocation, &left, left - 1)) continue;
    if (left == 1) return 0;
    const size_t lines = whole(bytes, LINE), pages = whole(lines, PAGE);
    char *map = mapped(pages + 2 * PAGE);
    mprotect(map + 2 * PAGE, PAGE, PROT_NONE);
    char *data = map + 3 * PAGE + pages - lines;
    memset(map + 3 * PAGE, CANARY, pages);
    memset(data, 0xFF, bytes);
    *(struct guarded *)(map + PAGE) = (struct guarded){
        .map = map + 2 * PAGE, .map_bytes = pages + 2 * PAGE, .data = data, .bytes = bytes};
    allocated++;
    return data;
}

void __wrap_free(void *data) {
    if (!data) return;
    char *map = (char *)((uintptr_t)data / PAGE * PAGE - 3 * PAGE);
    const struct guarded block = *(const struct guarded *)(map + PAGE);
    CHECK(block.data == data, "what is freed was not allocated");
    CHECK(intact(&block), "a write outside of allocated memory");
    munmap(map, block.map_bytes + 2 * PAGE);
    allocated--;
}
