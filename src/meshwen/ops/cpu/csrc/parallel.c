// SPDX-License-Identifier: Apache-2.0

#include "parallel.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "rounding.h"

#if defined(_WIN32)
#include <windows.h>
#define yield_thread() SwitchToThread()
#else
#include <sched.h>
#define yield_thread() sched_yield()
#endif

struct job {
    _Atomic int64_t users; // the last of them frees the job: one may begin after all has been done
    _Atomic int64_t next;  // unit to be taken
    _Atomic int64_t done;  // units
    _Atomic int failed;    // whether a unit had no memory
    int64_t units;
    unit_function *function;
    const void *task;
};

void *allocate(int64_t bytes) {
    // Where an aligned block begins, the address of the whole one stands before it.
    char *whole = malloc((size_t)bytes + 64 + sizeof(void *));
    if (!whole) return 0;
    char *aligned = (char *)(((uintptr_t)whole + sizeof(void *) + 63) / 64 * 64);
    ((void **)aligned)[-1] = whole;
    return aligned;
}

void release(void *memory) { free(((void **)memory)[-1]); }

error *count_threads(const call *call, int64_t most, int64_t *threads) {
    int64_t count = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args = {
        .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
        .ctx = call->ctx,
        .num_threads = &count,
    };
    error *error = most > 1 ? call->api->XLA_FFI_ThreadPool_NumThreads(&args) : 0;
    *threads = smaller(larger(count, 1), larger(most, 1));
    return error;
}

int64_t unit_parts(int64_t parts, int64_t threads) {
    return 2 * quotient_up(quotient_up(parts, 2), 16 * threads);
}

static void take_units(struct job *job) {
    const struct rounding before = round_to_nearest();
    for (;;) {
        const int64_t unit = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (unit >= job->units) break;
        if (!job->function(job->task, unit)) job->failed = 1;
        atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
    }
    restore(before);
}

static void leave(struct job *job, int64_t users) {
    if (atomic_fetch_sub_explicit(&job->users, users, memory_order_acq_rel) == users) free(job);
}

static void help(void *data) {
    take_units(data);
    leave(data, 1);
}

static void pause_thread(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    yield_thread(); // more devices than cores take turns
}

error *parallel(const call *call, unit_function *function, const void *task, int64_t units,
                int64_t threads) {
    const int64_t users = smaller(threads, units);
    struct job *job = malloc(sizeof *job);
    if (!job) return out_of_memory(call);
    *job = (struct job){.users = users, .units = units, .function = function, .task = task};
    XLA_FFI_ThreadPool_Schedule_Args args = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
        .ctx = call->ctx,
        .task = help,
        .data = job,
    };
    error *error = 0;
    for (int64_t scheduled = 1; scheduled < users; scheduled++) {
        error = call->api->XLA_FFI_ThreadPool_Schedule(&args);
        if (!error) continue;
        leave(job, users - scheduled); // Those that were scheduled do it, and XLA gets the error.
        break;
    }
    take_units(job);
    while (atomic_load_explicit(&job->done, memory_order_acquire) != units) pause_thread();
    const int failed = job->failed;
    leave(job, 1);
    return error || !failed ? error : out_of_memory(call);
}
