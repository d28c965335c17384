// SPDX-License-Identifier: Apache-2.0
//
// What XLA is to a kernel: calls with buffers and attributes, errors, and a pool of threads.

#ifndef XLA_H
#define XLA_H

#include "guarded.h"
#include "xla/ffi/api/c_api.h"

#define F32 XLA_FFI_DataType_F32
#define BF16 XLA_FFI_DataType_BF16
#define S8 XLA_FFI_DataType_S8
#define S32 XLA_FFI_DataType_S32

// The entries.
XLA_FFI_Error *meshwen_matmul(XLA_FFI_CallFrame *);
XLA_FFI_Error *meshwen_matmul_int8(XLA_FFI_CallFrame *);
XLA_FFI_Error *meshwen_paged_attention(XLA_FFI_CallFrame *);
XLA_FFI_Error *meshwen_write_cache(XLA_FFI_CallFrame *);
XLA_FFI_Error *meshwen_unwritten(XLA_FFI_CallFrame *);
const char *meshwen_instruction_set(int number);
int meshwen_supported(int number);
int meshwen_has_bf16_dot(int number);

struct XLA_FFI_Error {
    XLA_FFI_Error_Code code;
    char message[256];
};

// When what a kernel schedules is run.
enum pool_kind {
    POOL_THREADS, // by threads of the pool
    POOL_FIRST,   // by a thread of the pool, and to its end, before the caller goes on
    POOL_INLINE,  // at once, by the thread that schedules it
    POOL_LATE,    // when `pool_run_late` is called
};

struct pool {
    enum pool_kind kind;   // set by `pool_become`
    int64_t threads;       // that it says it has
    int refuses_count;     // whether it has no number of threads to tell
    long failing_schedule; // which one fails; 0: none
};
extern struct pool pool;

void pool_start(int threads);
void pool_become(enum pool_kind kind);
void pool_stop(void);
void pool_run_late(void);
// Waits until all that was scheduled is done.
void pool_wait(void);

// A call: the arguments, one after the other, and the result as the last; or the first arguments are
// written in place, and are the results.
#define MOST_BUFFERS 8
struct frame {
    XLA_FFI_CallFrame call;
    XLA_FFI_Buffer buffers[MOST_BUFFERS];
    int64_t dims[MOST_BUFFERS][5];
    struct guarded memory[MOST_BUFFERS];
    int count, in_place; // buffers; how many of the arguments are results
    void *pointers[MOST_BUFFERS];
    XLA_FFI_ArgType argument_types[MOST_BUFFERS];
    XLA_FFI_RetType result_types[3];
    void *results[3];
    XLA_FFI_ByteSpan names[2], set;
    XLA_FFI_ByteSpan *name_pointers[2];
    XLA_FFI_AttrType attribute_types[2];
    void *attributes[2];
    XLA_FFI_Scalar scalar;
    int64_t threads;
};

void frame_begin(struct frame *frame, const char *set, int64_t threads);
// Adds a buffer against a guard page, and returns its memory.
void *frame_buffer(struct frame *frame, XLA_FFI_DataType dtype, enum side side, int rank,
                   const int64_t *dims);
// What is no result may only be read from here on.
void frame_ready(struct frame *frame);
XLA_FFI_Error *frame_call(struct frame *frame, XLA_FFI_Handler *entry);
// Whether the results have the bytes that they had before the call.
int frame_untouched(const struct frame *frame);
// Checks the canaries, and gives the buffers back.
void frame_end(struct frame *frame);

size_t dtype_size(XLA_FFI_DataType dtype);

#endif
