// SPDX-License-Identifier: Apache-2.0
//
// Pools that come late or fail, an allocator that fails, callers beside one another, processes that
// fork, and threads that round otherwise.

#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "tests.h"

static const struct product PRODUCTS[] = {
    {FLOAT32, 5, 70, 400, 0},
    {WIDENED, 13, 70, 401, 0},
    {INT8, 1024, 1, 65, 0}, // so many rows that threads share their quantisation
};
static const struct paged PAGED = {BF16, 2, 3, 40, 64, 32, 40, {70, 33, 9}, {5, 1, 0}};
static const struct writes WRITES = {BF16, 4, 4, 64, 64, 32, 128}; // so many that threads share them
enum { INT8_CALL = 2, PAGED_CALL, WRITES_CALL, CALLS };

static XLA_FFI_Handler *begin_call(struct frame *frame, const char *set, int call) {
    at("%s: call %d", set, call);
    frame_begin(frame, set, 8);
    if (call == PAGED_CALL) {
        paged_frame(frame, PAGED, AT_END);
        return meshwen_paged_attention;
    }
    if (call == WRITES_CALL) {
        writes_frame(frame, WRITES, AT_END);
        return meshwen_write_cache;
    }
    product_frame(frame, PRODUCTS[call], AT_END);
    return product_entry(PRODUCTS[call]);
}

static void check_call(const struct frame *frame, int call) {
    if (call == PAGED_CALL)
        paged_check(frame, PAGED);
    else if (call == WRITES_CALL)
        writes_check(frame, WRITES);
    else
        product_check(frame, PRODUCTS[call]);
}

// Calls; an error has to have this code. Returns whether there was one.
static int one_call(const char *set, int call, XLA_FFI_Error_Code expected) {
    struct frame frame;
    XLA_FFI_Handler *entry = begin_call(&frame, set, call);
    const XLA_FFI_Error *error = frame_call(&frame, entry);
    if (error)
        CHECK(error->code == expected, "the error %s", error->message);
    else
        check_call(&frame, call);
    frame_end(&frame);
    return error != 0;
}

static void no_memory(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    for (int call = 0; call < CALLS; call++)
        for (long failing = 1;; failing++) {
            failing_allocation = failing;
            const int failed = one_call(set, call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
            const int reached = !failing_allocation;
            failing_allocation = 0;
            pool_wait();
            CHECK(!allocated, "%ld blocks of memory were not freed", (long)allocated);
            CHECK(failed == reached, "allocation %ld failed, which was not said", failing);
            if (!reached) break;
        }
}

void test_no_memory(void) { with_each_set(no_memory); }

static void pools(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    for (int call = 0; call < CALLS; call++) {
        pool_become(POOL_INLINE);
        CHECK(!one_call(set, call, 0), "refused");
        pool_become(POOL_LATE); // All threads are busy, until the buffers are gone.
        CHECK(!one_call(set, call, 0), "refused");
        pool_run_late();
        CHECK(!allocated, "who came late did not free the job");
        pool_become(POOL_FIRST); // Another thread does all of it.
        pool.threads = 2;
        CHECK(!one_call(set, call, 0), "refused");
        pool_become(POOL_THREADS);
        for (pool.threads = -1; pool.threads < 70; pool.threads += 23)
            CHECK(!one_call(set, call, 0), "refused");
        pool.threads = 3;
        for (int64_t failing = 1; failing < 4; failing++) {
            pool_wait();
            pool.failing_schedule = failing;
            const int failed = one_call(set, call, XLA_FFI_Error_Code_UNAVAILABLE);
            // Two are scheduled, and one of the second task of int8.
            const int schedules = call == INT8_CALL ? 3 : 2;
            CHECK(failed == (failing <= schedules), "the %dth fails: %d", (int)failing, failed);
            pool.failing_schedule = 0;
        }
        pool.refuses_count = 1;
        CHECK(one_call(set, call, XLA_FFI_Error_Code_UNAVAILABLE), "not refused");
        pool.refuses_count = 0;
    }
}

void test_pools(void) { with_each_set(pools); }

static void *call_many(void *set) {
    for (int i = 0; i < 2 * CALLS; i++) CHECK(!one_call(set, i % CALLS, 0), "refused");
    return 0;
}

static void callers(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    pthread_t others[3];
    for (int i = 0; i < 3; i++) CHECK(!pthread_create(others + i, 0, call_many, (void *)set), "no");
    for (int i = 0; i < 3; i++) pthread_join(others[i], 0);
}

void test_callers(void) { with_each_set(callers); }

// In the child there is no thread of the pool, but XLA's queue takes tasks all the same.
static void forked(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    call_many((void *)set);
    pool_wait();
    const pid_t child = fork();
    if (!child) {
        alarm(SECONDS);
        pool.threads = 1;
        call_many((void *)set);
        pool.threads = 3;
        call_many((void *)set);
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status), "the child ended with %d", status);
}

void test_fork(void) { with_each_set(forked); }

#if defined(__x86_64__)
// A call by a thread that has a mode of its own, of rows that are subnormal.
static void call_rounding(const char *set, int call, unsigned mode) {
    struct frame frame;
    struct product of = PRODUCTS[call % 3];
    XLA_FFI_Handler *entry;
    of.tiny = call < PAGED_CALL;
    if (of.tiny) {
        frame_begin(&frame, set, 8);
        product_frame(&frame, of, AT_END);
        entry = product_entry(of);
    } else {
        entry = begin_call(&frame, set, call);
    }
    at("%s: call %d in mode %x", set, call, mode);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(mode);
    const XLA_FFI_Error *error = frame_call(&frame, entry);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK(!error, "refused: %s", error->message);
    CHECK(after == mode, "the mode was not put back: %x", after);
    if (of.tiny)
        product_check(&frame, of);
    else
        check_call(&frame, call);
    frame_end(&frame);
}

// Whatever a thread makes of subnormal numbers and of ties; it has its mode back.
static void rounding(const char *set, int has_bf16_dot) {
    (void)has_bf16_dot;
    static const unsigned modes[] = {0x1F80, 0x9FC0, 0x3F80, 0x5F80, 0x7F80, 0xFFC0};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        for (int call = 0; call < CALLS; call++) call_rounding(set, call, modes[i]);
    pool_become(POOL_FIRST); // Threads of the pool have another mode.
    for (int call = 0; call < CALLS; call++) call_rounding(set, call, modes[0]);
    pool_become(POOL_THREADS);
}

void test_rounding(void) { with_each_set(rounding); }
#else // No other processor's mode is set here.
void test_rounding(void) {}
#endif
