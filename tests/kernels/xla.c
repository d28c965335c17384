// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "xla.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define MOST_TASKS 4096
#define MOST_THREADS 16

struct task {
    XLA_FFI_Task *function;
    void *data;
};

struct pool pool = {.threads = 1};
static pthread_t threads[MOST_THREADS];
static int running_threads, stopping;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct task tasks[MOST_TASKS];
static long first_task, task_count, busy, schedules;
static _Atomic long finished; // tasks
static _Thread_local struct XLA_FFI_Error last_error;

static void lock(void) { pthread_mutex_lock(&mutex); }
static void unlock(void) { pthread_mutex_unlock(&mutex); }

static XLA_FFI_Error *create_error(XLA_FFI_Error_Create_Args *args) {
    CHECK(args->struct_size == XLA_FFI_Error_Create_Args_STRUCT_SIZE, "a struct has another size");
    CHECK(!last_error.code, "an error after the error %s", last_error.message);
    last_error.code = args->errc;
    snprintf(last_error.message, sizeof last_error.message, "%s", args->message);
    return &last_error;
}

static XLA_FFI_Error *pool_error(const char *message) {
    XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                      .message = message,
                                      .errc = XLA_FFI_Error_Code_UNAVAILABLE};
    return create_error(&args);
}

static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
    CHECK(args->struct_size == XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, "another size");
    CHECK(args->ctx == (XLA_FFI_ExecutionContext *)&pool, "another context");
    if (pool.kind == POOL_INLINE) {
        args->task(args->data);
        return 0;
    }
    const long before = finished;
    lock();
    const int fails = ++schedules == pool.failing_schedule;
    if (!fails) {
        CHECK(task_count < MOST_TASKS, "too many tasks");
        tasks[(first_task + task_count++) % MOST_TASKS] = (struct task){args->task, args->data};
        pthread_cond_broadcast(&changed);
    }
    const int waits = pool.kind == POOL_FIRST && !fails;
    unlock();
    // Not by what would order memory as well: that is for the kernels to do.
    while (waits && atomic_load_explicit(&finished, memory_order_relaxed) == before) sched_yield();
    return fails ? pool_error("schedule") : 0;
}

static XLA_FFI_Error *num_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
    CHECK(args->struct_size == XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, "another size");
    if (pool.refuses_count) return pool_error("no pool");
    *args->num_threads = pool.threads;
    return 0;
}

static const XLA_FFI_Api api = {
    .struct_size = XLA_FFI_Api_STRUCT_SIZE,
    .XLA_FFI_Error_Create = create_error,
    .XLA_FFI_ThreadPool_Schedule = schedule,
    .XLA_FFI_ThreadPool_NumThreads = num_threads,
};

// Runs the first task; the mutex is held before and after.
static void run_first(void) {
    const struct task task = tasks[first_task++ % MOST_TASKS];
    task_count--, busy++;
    unlock();
    task.function(task.data);
    atomic_fetch_add_explicit(&finished, 1, memory_order_relaxed);
    lock();
    busy--;
    pthread_cond_broadcast(&changed);
}

static void *work(void *unused) {
    (void)unused;
#if defined(__x86_64__)
    _mm_setcsr(0x9FC0); // As XLA's threads: subnormals are zeros.
#endif
    lock();
    while (!stopping) {
        if (task_count && pool.kind != POOL_LATE)
            run_first();
        else
            pthread_cond_wait(&changed, &mutex);
    }
    unlock();
#if defined(__x86_64__)
    CHECK((_mm_getcsr() & 0xFFC0) == 0x9FC0, "a thread's rounding mode was not put back");
#endif
    return 0;
}

// A condition that threads of the parent wait for would wait for them, who are not in the child.
static void unlock_in_child(void) {
    pthread_cond_init(&changed, 0);
    unlock();
}

void pool_start(int count) {
    static int forks;
    if (!forks++) pthread_atfork(lock, unlock, unlock_in_child);
    stopping = 0, schedules = 0;
    pool = (struct pool){.kind = POOL_THREADS, .threads = count};
    for (running_threads = 0; running_threads < count; running_threads++)
        CHECK(!pthread_create(threads + running_threads, 0, work, 0), "no thread");
}

void pool_become(enum pool_kind kind) {
    lock();
    pool.kind = kind;
    unlock();
}

void pool_stop(void) {
    pool_wait();
    lock();
    stopping = 1;
    pthread_cond_broadcast(&changed);
    unlock();
    while (running_threads) pthread_join(threads[--running_threads], 0);
}

void pool_wait(void) {
    lock();
    while (pool.kind != POOL_LATE && (task_count || busy)) pthread_cond_wait(&changed, &mutex);
    schedules = 0;
    unlock();
}

void pool_run_late(void) {
    lock();
    while (task_count) run_first();
    unlock();
}

size_t dtype_size(XLA_FFI_DataType dtype) {
    return dtype == S8 ? 1 : dtype == BF16 ? 2 : 4;
}

void frame_begin(struct frame *frame, const char *set, int64_t threads) {
    *frame = (struct frame){.threads = threads};
    frame->scalar = (XLA_FFI_Scalar){XLA_FFI_DataType_S64, &frame->threads};
    frame->set = (XLA_FFI_ByteSpan){set, strlen(set)};
    const char *names[] = {"instruction_set", "threads"}; // sorted
    for (int i = 0; i < 2; i++) {
        frame->names[i] = (XLA_FFI_ByteSpan){names[i], strlen(names[i])};
        frame->name_pointers[i] = &frame->names[i];
    }
    frame->attributes[0] = &frame->set;
    frame->attributes[1] = &frame->scalar;
    frame->attribute_types[0] = XLA_FFI_AttrType_STRING;
    frame->attribute_types[1] = XLA_FFI_AttrType_SCALAR;
    frame->call = (XLA_FFI_CallFrame){
        .struct_size = XLA_FFI_CallFrame_STRUCT_SIZE,
        .api = &api,
        .ctx = (XLA_FFI_ExecutionContext *)&pool,
        .stage = XLA_FFI_ExecutionStage_EXECUTE,
        .attrs = {.struct_size = XLA_FFI_Attrs_STRUCT_SIZE,
                  .size = 2,
                  .types = frame->attribute_types,
                  .names = frame->name_pointers,
                  .attrs = frame->attributes},
    };
}

void *frame_buffer(struct frame *frame, XLA_FFI_DataType dtype, enum side side, int rank,
                   const int64_t *dims) {
    const int n = frame->count++;
    size_t bytes = dtype_size(dtype);
    for (int i = 0; i < rank; i++) bytes *= (size_t)(frame->dims[n][i] = dims[i]);
    frame->memory[n] = guarded(bytes, side);
    frame->buffers[n] = (XLA_FFI_Buffer){.struct_size = XLA_FFI_Buffer_STRUCT_SIZE,
                                         .dtype = dtype,
                                         .data = frame->memory[n].data,
                                         .rank = rank,
                                         .dims = frame->dims[n]};
    return frame->memory[n].data;
}

// The first buffer that is a result, and how many are.
static int first_result(const struct frame *frame) { return frame->in_place ? 0 : frame->count - 1; }
static int result_count(const struct frame *frame) { return frame->in_place ? frame->in_place : 1; }

void frame_ready(struct frame *frame) {
    const int arguments = frame->in_place ? frame->count : frame->count - 1;
    const int first = first_result(frame), results = result_count(frame);
    for (int i = 0; i < arguments; i++) {
        if (i >= frame->in_place) protect(&frame->memory[i]);
        frame->pointers[i] = &frame->buffers[i];
        frame->argument_types[i] = XLA_FFI_ArgType_BUFFER;
    }
    for (int i = 0; i < 3; i++) { // One more than there are, for calls that say so.
        frame->results[i] = &frame->buffers[first + (i < results ? i : 0)];
        frame->result_types[i] = XLA_FFI_RetType_BUFFER;
    }
    frame->call.args = (XLA_FFI_Args){.struct_size = XLA_FFI_Args_STRUCT_SIZE,
                                      .size = arguments,
                                      .types = frame->argument_types,
                                      .args = frame->pointers};
    frame->call.rets = (XLA_FFI_Rets){.struct_size = XLA_FFI_Rets_STRUCT_SIZE,
                                      .size = results,
                                      .types = frame->result_types,
                                      .rets = frame->results};
}

XLA_FFI_Error *frame_call(struct frame *frame, XLA_FFI_Handler *entry) {
    last_error = (struct XLA_FFI_Error){0};
    XLA_FFI_Error *error = entry(&frame->call);
    CHECK(error || !last_error.code, "the error %s was lost", last_error.message);
    return error;
}

int frame_untouched(const struct frame *frame) {
    const int first = first_result(frame);
    for (int n = first; n < first + result_count(frame); n++)
        for (size_t i = 0; i < frame->memory[n].bytes; i++)
            if (frame->memory[n].data[i] != (char)0xFF) return 0;
    return 1;
}

void frame_end(struct frame *frame) {
    for (int i = 0; i < frame->count; i++) {
        CHECK(intact(&frame->memory[i]), "a write outside of buffer %d", i);
        drop(&frame->memory[i]);
    }
}
