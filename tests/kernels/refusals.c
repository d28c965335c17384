// SPDX-License-Identifier: Apache-2.0
//
// Calls that do not fit: each is refused by an error of XLA's, and its result is left alone.

#include <stddef.h>
#include <string.h>

#include "tests.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
#define INVALID XLA_FFI_Error_Code_INVALID_ARGUMENT

enum { MATMUL, MATMUL_BFLOAT16, MATMUL_INT8, PAGED, WRITES, ENTRIES };

// The last instruction set: there is one on every processor.
static const char *some_set(void) {
    int last = 0;
    while (meshwen_instruction_set(last + 1)) last++;
    return meshwen_instruction_set(last);
}

static XLA_FFI_Handler *begin(struct frame *frame, int entry) {
    frame_begin(frame, some_set(), 8);
    if (entry == PAGED) {
        paged_frame(frame, (struct paged){F32, 2, 3, 20, 32, 32, 40, {70, 9, 33}, {5, 0, 1}}, AT_END);
        return meshwen_paged_attention;
    }
    if (entry == WRITES) {
        writes_frame(frame, (struct writes){F32, 3, 2, 20, 32, 32, 7}, AT_END);
        return meshwen_write_cache;
    }
    static const struct product products[] = {
        {FLOAT32, 5, 6, 33, 0}, {WIDENED, 5, 6, 33, 0}, {INT8, 5, 2, 33, 0}};
    product_frame(frame, products[entry], AT_END);
    return product_entry(products[entry]);
}

static void refused(struct frame *frame, XLA_FFI_Handler *entry) {
    const XLA_FFI_Error *error = frame_call(frame, entry);
    CHECK(error, "not refused");
    CHECK(error->code == INVALID, "another error: %s", error->message);
    CHECK(!strncmp(error->message, "meshwen: ", 9), "who refused it? %s", error->message);
    CHECK(frame_untouched(frame), "the result was touched");
    frame_end(frame);
}

static const int64_t SIZES[] = {
    INT64_MIN, -((int64_t)1 << 32), -33, -32, -2, -1, 0, (int64_t)1 << 31, (int64_t)1 << 32,
    ((int64_t)1 << 32) + 2, (int64_t)1 << 40, (int64_t)1 << 58, (int64_t)1 << 62, INT64_MAX,
};

// Whether an axis may have other sizes: columns of a matmul's result, and blocks of a table.
static int is_free(const struct frame *frame, int entry, int buffer, int axis) {
    if (entry == PAGED) return buffer == 5 && axis == 1;
    return entry < PAGED && buffer == frame->count - 1 && axis == 1;
}

// One size of one buffer.
static void one_size(int entry, int buffer, int axis, int64_t size) {
    struct frame frame;
    XLA_FFI_Handler *handler = begin(&frame, entry);
    at("entry %d: axis %d of buffer %d is %lld", entry, axis, buffer, (long long)size);
    frame.dims[buffer][axis] = size;
    refused(&frame, handler);
}

static void each_size(void) {
    for (int entry = 0; entry < ENTRIES; entry++) {
        struct frame frame;
        begin(&frame, entry);
        for (int buffer = 0; buffer < frame.count; buffer++)
            for (int axis = 0; axis < frame.buffers[buffer].rank; axis++) {
                const int64_t size = frame.dims[buffer][axis];
                const int free = is_free(&frame, entry, buffer, axis);
                for (int i = 0; i < COUNT(SIZES); i++)
                    if (!free || entry != PAGED || SIZES[i] <= 0 || SIZES[i] > (int64_t)1 << 48)
                        one_size(entry, buffer, axis, SIZES[i]);
                if (free && entry == PAGED) continue;
                one_size(entry, buffer, axis, free ? 32 : size - 1);
                one_size(entry, buffer, axis, free ? 65 : size + 1);
                if (size > 1) one_size(entry, buffer, axis, free ? 66 : 2 * size);
            }
        frame_end(&frame);
    }
}

// Sizes of several buffers that agree with one another: axes as buffer * 4 + axis.
struct agreed {
    int entry, axes[6];
    int64_t sizes[6];
};

#define END -1

static void agreeing_sizes(void) {
    const int64_t most = INT64_MAX, big = (int64_t)1 << 61;
    const struct agreed cases[] = {
        // Rows of the factor and of the result.
        {MATMUL, {0, 8, END}, {-1, -1}},
        {MATMUL, {0, 8, END}, {big, big}},
        {MATMUL, {0, 8, END}, {most, most}},
        {MATMUL_INT8, {0, 12, END}, {-5, -5}},
        {MATMUL_INT8, {0, 12, END}, {big, big}},
        {MATMUL_INT8, {0, 12, END}, {(int64_t)1 << 50, (int64_t)1 << 50}},
        // Steps, of b and in the factor.
        {MATMUL, {1, 5, END}, {-6, -6}},
        {MATMUL, {1, 5, END}, {0, 0}},
        {MATMUL, {1, 5, END}, {big, big}},
        {MATMUL_BFLOAT16, {1, 5, END}, {-2, -1}},
        {MATMUL_BFLOAT16, {1, 5, END}, {0, big * 2}}, // twice as many are negative, wrapped
        {MATMUL_BFLOAT16, {0, 1, 8, 5, END}, {0, 0, 0, big * 2}},
        {MATMUL_INT8, {1, 5, 9, END}, {-32, -8, -1}},
        {MATMUL_INT8, {1, 5, 9, END}, {0, 0, 0}},
        {MATMUL_INT8, {1, 5, 9, END}, {0, 0, big}}, // eight and 32 times as many are 0, wrapped
        // Panels and columns.
        {MATMUL, {4, 9, END}, {-1, -32}},
        {MATMUL, {4, 9, END}, {1, -31}}, // one panel, if the quotient is rounded up
        {MATMUL, {4, 9, END}, {most / 32, most / 32 * 32}},
        {MATMUL_INT8, {4, 8, 13, END}, {-1, -1, -32}},
        {MATMUL_INT8, {4, 8, 13, END}, {1, 1, -31}},
        {MATMUL_INT8, {4, 8, 13, END}, {big, big, most}},
        // No rows, and too many steps.
        {MATMUL, {0, 1, 5, 8, END}, {0, big * 2, big * 2, 0}},
        // q [N, heads, h], keys [P, K, H, S], values [P, K, S, H], starts, lengths, tables, window, y.
        {PAGED, {0, 28, END}, {-1, -1}},
        {PAGED, {0, 28, END}, {5, 5}}, // fewer tokens than sequences have
        {PAGED, {0, 28, END}, {big, big}},
        {PAGED, {1, 29, END}, {7, 7}}, // heads that do not share 2
        {PAGED, {1, 29, END}, {-6, -6}},
        {PAGED, {1, 29, END}, {big, big}},
        {PAGED, {2, 30, END}, {33, 33}}, // more dimensions than the pool's
        {PAGED, {2, 30, END}, {-1, -1}},
        {PAGED, {4, 8, END}, {0, 0}}, // blocks
        {PAGED, {4, 8, END}, {1, 1}},
        {PAGED, {4, 8, END}, {-3, -3}},
        {PAGED, {5, 9, END}, {0, 0}},
        {PAGED, {5, 9, END}, {4, 4}}, // of which 6 heads are no multiple
        {PAGED, {5, 9, END}, {big, big}},
        {PAGED, {6, 11, END}, {0, 0}},
        {PAGED, {6, 11, END}, {31, 31}},
        {PAGED, {6, 11, END}, {-32, -32}},
        {PAGED, {7, 10, END}, {0, 0}},
        {PAGED, {7, 10, END}, {33, 33}},
        {PAGED, {7, 10, END}, {-32, -32}},
        {PAGED, {7, 10, END}, {big, big}},
        {PAGED, {12, 16, 20, END}, {0, -1, -1}}, // sequences
        {PAGED, {12, 16, 20, END}, {big + 1, big, big}},
        {PAGED, {12, 16, 20, END}, {INT64_MIN, most, most}},
        // keys, values, new keys [N, K, h], new values, slots.
        {WRITES, {0, 4, END}, {0, 0}},
        {WRITES, {0, 4, END}, {2, 2}}, // fewer blocks than slots say
        {WRITES, {0, 4, END}, {-3, -3}},
        {WRITES, {1, 5, 9, 13, END}, {-2, -2, -2, -2}},
        {WRITES, {1, 5, 9, 13, END}, {big, big, big, big}},
        {WRITES, {2, 7, END}, {0, 0}},
        {WRITES, {2, 7, END}, {31, 31}},
        {WRITES, {3, 6, END}, {0, 0}},
        {WRITES, {3, 6, END}, {33, 33}},
        {WRITES, {3, 6, END}, {big, big}},
        {WRITES, {8, 12, 16, END}, {-1, -1, -1}},
        {WRITES, {8, 12, 16, END}, {big, big, big}},
        {WRITES, {10, 14, END}, {33, 33}}, // more dimensions than the pool's
        {WRITES, {10, 14, END}, {-1, -1}},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct frame frame;
        XLA_FFI_Handler *handler = begin(&frame, cases[i].entry);
        at("sizes that agree, case %d of entry %d", i, cases[i].entry);
        for (int n = 0; n < 6 && cases[i].axes[n] != END; n++)
            frame.dims[cases[i].axes[n] / 4][cases[i].axes[n] % 4] = cases[i].sizes[n];
        refused(&frame, handler);
    }
}

void test_wrong_sizes(void) {
    each_size();
    agreeing_sizes();
}

// What is wrong with a buffer.
static void wrong_dtype(XLA_FFI_Buffer *buffer, int64_t to) { buffer->dtype = (XLA_FFI_DataType)to; }
static void wrong_rank(XLA_FFI_Buffer *buffer, int64_t to) { buffer->rank = to; }
static void no_axes(XLA_FFI_Buffer *buffer, int64_t unused) {
    (void)unused;
    buffer->rank = 0, buffer->dims = 0;
}
static void wrong_data(XLA_FFI_Buffer *buffer, int64_t by) {
    buffer->data = by ? (char *)buffer->data + by : 0;
}

static void one_buffer(int entry, int buffer, void (*wrong)(XLA_FFI_Buffer *, int64_t), int64_t to) {
    struct frame frame;
    XLA_FFI_Handler *handler = begin(&frame, entry);
    at("entry %d: buffer %d gets %lld", entry, buffer, (long long)to);
    wrong(&frame.buffers[buffer], to);
    refused(&frame, handler);
}

void test_wrong_buffers(void) {
    for (int entry = 0; entry < ENTRIES; entry++) {
        struct frame frame;
        begin(&frame, entry);
        for (int n = 0; n < frame.count; n++) {
            const XLA_FFI_Buffer *buffer = &frame.buffers[n];
            for (int dtype = -1; dtype < 40; dtype++) // Two bfloat16 may be multiplied.
                if (dtype != (int)buffer->dtype && !(entry == MATMUL_BFLOAT16 && !n && dtype == BF16))
                    one_buffer(entry, n, wrong_dtype, dtype);
            for (int rank = -1; rank < 6; rank++)
                if (rank != buffer->rank) one_buffer(entry, n, wrong_rank, rank);
            one_buffer(entry, n, wrong_rank, INT64_MAX);
            one_buffer(entry, n, no_axes, 0);
            one_buffer(entry, n, wrong_data, 0);
            for (int by = 1; by < (int)dtype_size(buffer->dtype); by++)
                one_buffer(entry, n, wrong_data, by);
        }
        frame_end(&frame);
    }
}

// What is wrong with the rest of a call.
static void many_arguments(struct frame *frame) { frame->call.args.size++; }
static void few_arguments(struct frame *frame) { frame->call.args.size--; }
static void no_arguments(struct frame *frame) {
    frame->call.args = (XLA_FFI_Args){.struct_size = XLA_FFI_Args_STRUCT_SIZE};
}
static void strange_argument(struct frame *frame) { frame->argument_types[1] = (XLA_FFI_ArgType)2; }
static void many_results(struct frame *frame) { frame->call.rets.size++; }
static void no_results(struct frame *frame) {
    frame->call.rets = (XLA_FFI_Rets){.struct_size = XLA_FFI_Rets_STRUCT_SIZE};
}
static void strange_result(struct frame *frame) { frame->result_types[0] = (XLA_FFI_RetType)2; }
static void no_attributes(struct frame *frame) {
    frame->call.attrs = (XLA_FFI_Attrs){.struct_size = XLA_FFI_Attrs_STRUCT_SIZE};
}
static void no_set(struct frame *frame) { frame->names[0].len--; }
static void no_threads(struct frame *frame) { frame->names[1].ptr = "Threads"; }
static void number_as_set(struct frame *frame) {
    frame->attribute_types[0] = XLA_FFI_AttrType_SCALAR;
    frame->attributes[0] = &frame->scalar;
}
static void text_as_threads(struct frame *frame) {
    frame->attribute_types[1] = XLA_FFI_AttrType_STRING;
    frame->attributes[1] = &frame->set;
}
static void short_threads(struct frame *frame) { frame->scalar.dtype = S32; }
static void empty_set(struct frame *frame) { frame->set = (XLA_FFI_ByteSpan){0, 0}; }
static void unknown_set(struct frame *frame) { frame->set = (XLA_FFI_ByteSpan){"portables", 9}; }
static void part_of_set(struct frame *frame) { frame->set.len--; }
static void long_set(struct frame *frame) {
    frame->set = (XLA_FFI_ByteSpan){"portable portable portable portable", 32};
}

void test_wrong_attributes(void) {
    static void (*const wrongs[])(struct frame *) = {
        many_arguments, few_arguments,   no_arguments,  strange_argument, many_results, no_results,
        strange_result, no_attributes,   no_set,        no_threads,       number_as_set,
        text_as_threads, short_threads,  empty_set,     unknown_set,      part_of_set,  long_set};
    for (int entry = 0; entry < ENTRIES; entry++) {
        struct frame frame;
        for (int i = 0; i < COUNT(wrongs); i++) {
            XLA_FFI_Handler *handler = begin(&frame, entry);
            at("entry %d: wrong in way %d", entry, i);
            wrongs[i](&frame);
            refused(&frame, handler);
        }
        for (int i = 0; meshwen_instruction_set(i); i++) { // The text may not end by 0.
            XLA_FFI_Handler *handler = begin(&frame, entry);
            const size_t length = strlen(meshwen_instruction_set(i));
            struct guarded text = guarded(length, AT_END);
            memcpy(text.data, meshwen_instruction_set(i), length);
            frame.set = (XLA_FFI_ByteSpan){text.data, length};
            at("entry %d: %s", entry, meshwen_instruction_set(i));
            if (meshwen_supported(i)) {
                CHECK(!frame_call(&frame, handler), "refused");
                frame_end(&frame);
            } else {
                refused(&frame, handler);
            }
            drop(&text);
        }
        static const int64_t threads[] = {INT64_MIN, -1, 0, 1, INT64_MAX};
        for (int i = 0; i < COUNT(threads); i++) {
            XLA_FFI_Handler *handler = begin(&frame, entry);
            at("entry %d: %lld threads", entry, (long long)threads[i]);
            frame.threads = threads[i];
            CHECK(!frame_call(&frame, handler), "refused");
            frame_end(&frame);
        }
    }
    CHECK(!meshwen_instruction_set(-1) && !meshwen_supported(-1), "set -1 is there");
    CHECK(!meshwen_instruction_set(99) && !meshwen_supported(99), "set 99 is there");
    CHECK(!meshwen_has_bf16_dot(-1) && !meshwen_has_bf16_dot(99), "and multiplies bfloat16");
}

// Pairs where there is no instruction for them.
static void no_dot(const char *set, int has_bf16_dot) {
    if (has_bf16_dot) return;
    struct frame frame;
    at("%s has a dot product of bfloat16", set);
    frame_begin(&frame, set, 8);
    product_frame(&frame, (struct product){DOT, 5, 6, 33, 0}, AT_END);
    refused(&frame, meshwen_matmul);
}

// Numbers in buffers that lead out of the cache: 12 blocks, of 5 tokens of 70 positions, of none, of one
// of 33, which is the second last; or 96 slots.
void test_wrong_places(void) {
    static const struct {
        int entry, buffer, place;
        int32_t value;
    } cases[] = {
        {PAGED, 3, 0, -1}, {PAGED, 3, 0, 6}, {PAGED, 3, 0, INT32_MIN}, {PAGED, 3, 1, 6},
        {PAGED, 3, 1, INT32_MAX}, {PAGED, 3, 2, 4}, {PAGED, 3, 3, 9}, {PAGED, 3, 3, 4},
        {PAGED, 3, 3, INT32_MAX}, {PAGED, 4, 0, 4}, {PAGED, 4, 0, -1}, {PAGED, 4, 0, 129},
        {PAGED, 4, 0, INT32_MAX}, {PAGED, 4, 0, INT32_MIN}, {PAGED, 4, 1, -1},
        {PAGED, 4, 1, 129}, {PAGED, 4, 2, 0}, {PAGED, 5, 0, -1}, {PAGED, 5, 0, 12},
        {PAGED, 5, 2, 12}, {PAGED, 5, 9, 12}, {PAGED, 5, 9, -1}, {PAGED, 5, 9, INT32_MIN},
        {PAGED, 5, 8, INT32_MAX}, {PAGED, 6, 0, 0}, {PAGED, 6, 0, -1}, {PAGED, 6, 0, INT32_MIN},
        {WRITES, 4, 0, 96}, {WRITES, 4, 6, 96}, {WRITES, 4, 3, -2},
        {WRITES, 4, 6, INT32_MAX}, {WRITES, 4, 0, INT32_MIN},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        struct frame frame;
        XLA_FFI_Handler *handler = begin(&frame, cases[i].entry);
        at("entry %d: buffer %d has %d", cases[i].entry, cases[i].buffer, cases[i].value);
        unprotect(&frame.memory[cases[i].buffer]);
        ((int32_t *)frame.buffers[cases[i].buffer].data)[cases[i].place] = cases[i].value;
        refused(&frame, handler);
    }
    with_each_set(no_dot);
}

// XLA asks for the version before it calls, with a frame that has nothing else.
void test_version(void) {
    XLA_FFI_Handler *const handlers[] = {meshwen_matmul, meshwen_matmul_int8, meshwen_paged_attention,
                                         meshwen_write_cache, meshwen_unwritten};
    for (int i = 0; i < COUNT(handlers); i++) {
        // What is behind the traits, early versions of XLA have not.
        union {
            XLA_FFI_Metadata asked;
            unsigned char bytes[XLA_FFI_Metadata_STRUCT_SIZE + 8];
        } metadata;
        memset(&metadata, 77, sizeof metadata);
        metadata.asked.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
        XLA_FFI_Metadata_Extension extension = {
            .extension_base = {.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE,
                               .type = XLA_FFI_Extension_Metadata},
            .metadata = &metadata.asked,
        };
        XLA_FFI_CallFrame call = {.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE,
                                  .extension_start = &extension.extension_base};
        at("the version of entry %d", i);
        CHECK(!handlers[i](&call), "refused");
        CHECK(metadata.asked.api_version.major_version == XLA_FFI_API_MAJOR, "another version");
        CHECK(metadata.asked.api_version.minor_version == 1, "another version"); // an early one
        CHECK(!metadata.asked.traits, "traits");
        for (size_t i = XLA_FFI_Metadata_STRUCT_SIZE; i < sizeof metadata.bytes; i++)
            CHECK(metadata.bytes[i] == 77, "byte %zu is changed", i);
    }
}
