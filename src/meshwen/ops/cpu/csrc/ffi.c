// SPDX-License-Identifier: Apache-2.0

#include "ffi.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// Of a buffer: more than any computer's memory, yet so little that sums and products of sizes that the
// entries and kernels make of it do not overflow.
#define MOST_BYTES ((int64_t)1 << 48)

static size_t dtype_bytes(XLA_FFI_DataType dtype) {
    switch (dtype) {
    case XLA_FFI_DataType_S8:
        return 1;
    case XLA_FFI_DataType_BF16:
        return 2;
    default: // float32 and int32
        return 4;
    }
}

static const char *dtype_name(XLA_FFI_DataType dtype) {
    switch (dtype) {
    case XLA_FFI_DataType_S8:
        return "int8";
    case XLA_FFI_DataType_S32:
        return "int32";
    case XLA_FFI_DataType_BF16:
        return "bfloat16";
    case XLA_FFI_DataType_F32:
        return "float32";
    default:
        return "another dtype";
    }
}

int described(const call *call) {
    // Headers differ in what they call its type.
    __typeof__(call->extension_start) extension = call->extension_start;
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    // An early one: later ones have all that is used here, whichever header this was compiled with.
    metadata->api_version.minor_version = 1;
    metadata->traits = 0; // The rest stays as XLA has set it: in early versions it ends here.
    return 1;
}

static error *failed(const call *call, XLA_FFI_Error_Code code, const char *message) {
    XLA_FFI_Error_Create_Args args = {
        .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
        .message = message,
        .errc = code,
    };
    return call->api->XLA_FFI_Error_Create(&args);
}

error *refused(const call *call, const char *format, ...) {
    char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return failed(call, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
}

error *out_of_memory(const call *call) {
    return failed(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "meshwen: no memory for a kernel");
}

error *counted(const call *call, int64_t arguments, int64_t results) {
    if (call->args.size != arguments || call->rets.size != results)
        return refused(call, "meshwen: %lld arguments and %lld results, not %lld and %lld",
                       (long long)call->args.size, (long long)call->rets.size, (long long)arguments,
                       (long long)results);
    int buffers = 1;
    for (int64_t i = 0; i < results; i++)
        buffers &= call->rets.types[i] == XLA_FFI_RetType_BUFFER;
    for (int64_t i = 0; i < arguments; i++)
        buffers &= call->args.types[i] == XLA_FFI_ArgType_BUFFER;
    return buffers ? 0 : refused(call, "meshwen: not all arguments and results are buffers");
}

const buffer *argument(const call *call, int64_t number) { return call->args.args[number]; }
const buffer *result(const call *call, int64_t number) { return call->rets.rets[number]; }

error *checked(const call *call, const buffer *buffer, struct expected expected) {
    if (buffer->dtype != expected.dtype)
        return refused(call, "meshwen: %s is %s, not %s", expected.name, dtype_name(buffer->dtype),
                       dtype_name(expected.dtype));
    if (buffer->rank != expected.rank)
        return refused(call, "meshwen: %s has %lld axes, not %d", expected.name,
                       (long long)buffer->rank, expected.rank);
    const int64_t bytes = (int64_t)dtype_bytes(buffer->dtype);
    int64_t room = MOST_BYTES / bytes; // for so many times the numbers of the axes so far
    int empty = 0;
    for (int i = 0; i < expected.rank; i++) {
        const int64_t size = buffer->dims[i];
        if (expected.sizes[i] != ANY && size != expected.sizes[i])
            return refused(call, "meshwen: axis %d of %s is %lld, not %lld", i, expected.name,
                           (long long)size, (long long)expected.sizes[i]);
        if (size < 0 || size > room)
            return refused(call, "meshwen: axis %d of %s is %lld, which cannot be", i,
                           expected.name, (long long)size);
        if (size) room /= size;
        empty |= !size;
    }
    if (!empty && (!buffer->data || (uintptr_t)buffer->data % bytes))
        return refused(call, "meshwen: %s is not aligned to its numbers", expected.name);
    return 0;
}

// The place of an attribute, or -1.
static int64_t attribute(const call *call, const char *name, XLA_FFI_AttrType type) {
    for (int64_t i = 0; i < call->attrs.size; i++) {
        const XLA_FFI_ByteSpan *found = call->attrs.names[i];
        if (found->len == strlen(name) && !memcmp(found->ptr, name, found->len))
            return call->attrs.types[i] == type ? i : -1;
    }
    return -1;
}

error *attribute_int(const call *call, const char *name, int64_t *value) {
    int64_t i = attribute(call, name, XLA_FFI_AttrType_SCALAR);
    const XLA_FFI_Scalar *scalar = i < 0 ? 0 : call->attrs.attrs[i];
    if (!scalar || scalar->dtype != XLA_FFI_DataType_S64)
        return refused(call, "meshwen: the attribute %s has to be an int64", name);
    memcpy(value, scalar->value, sizeof *value);
    return 0;
}

error *attribute_text(const call *call, const char *name, char *text, size_t room) {
    int64_t i = attribute(call, name, XLA_FFI_AttrType_STRING);
    const XLA_FFI_ByteSpan *span = i < 0 ? 0 : call->attrs.attrs[i];
    if (!span || !span->len || span->len >= room)
        return refused(call, "meshwen: the attribute %s has to be a short text", name);
    memcpy(text, span->ptr, span->len);
    text[span->len] = 0;
    return 0;
}
