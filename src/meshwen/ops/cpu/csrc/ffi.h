// SPDX-License-Identifier: Apache-2.0
//
// What a call by XLA through its foreign function interface has, checked. The structures are those of
// jaxlib's header.

#ifndef MESHWEN_FFI_H
#define MESHWEN_FFI_H

#include <stdint.h>

#include "xla/ffi/api/c_api.h"

typedef XLA_FFI_CallFrame call;
typedef XLA_FFI_Buffer buffer;
typedef XLA_FFI_Error error;

// Whether XLA only asked which version of the interface a handler is made for; answers it.
int described(const call *call);

// An error of XLA's, INVALID_ARGUMENT, with a text as of `printf`.
error *refused(const call *call, const char *format, ...) __attribute__((format(printf, 2, 3)));
error *out_of_memory(const call *call);

#define ANY (-1)

// A buffer that is expected: what it is called in errors, its dtype, its sizes (or ANY).
struct expected {
    const char *name;
    XLA_FFI_DataType dtype;
    int rank;
    int64_t sizes[4];
};

// Whether there are exactly so many arguments and results, all of them buffers.
error *counted(const call *call, int64_t arguments, int64_t results);
const buffer *argument(const call *call, int64_t number);
const buffer *result(const call *call, int64_t number);
// Whether a buffer is as expected, of sizes that can be, and aligned to its numbers.
error *checked(const call *call, const buffer *buffer, struct expected expected);

// The attribute of a name: an int64, or a text that is written to `text` and ended by 0.
error *attribute_int(const call *call, const char *name, int64_t *value);
error *attribute_text(const call *call, const char *name, char *text, size_t room);

#endif
