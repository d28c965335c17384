// SPDX-License-Identifier: Apache-2.0
//
// The entries of a paged KV cache. Its pool is keys [P, K, H, S] and values [P, K, S, H], both float32
// or both bfloat16: P blocks of S positions, of K key/value heads of H dimensions. H and S are multiples
// of 32; a model may have fewer dimensions than H.

#include <string.h>

#include "entries.h"
#include "exported.h"
#include "panels.h"
#include "parallel.h"

// A unit of attention has about so many rows: few enough to share the work among threads, and enough
// for what they read to be read again from a near cache.
#define UNIT_ROWS 96
#define WRITTEN_ALONE (1 << 15) // numbers

// Whether a call's first two buffers from `first` on are the keys and values of a pool.
static error *checked_pool(const call *call, const buffer *keys, const buffer *values) {
    const XLA_FFI_DataType dtype = keys->dtype == F32 ? F32 : BF16;
    TRY(checked(call, keys, (struct expected){"keys", dtype, 4, {ANY, ANY, ANY, ANY}}));
    const int64_t P = keys->dims[0], K = keys->dims[1], H = keys->dims[2], S = keys->dims[3];
    TRY(checked(call, values, (struct expected){"values", dtype, 4, {P, K, S, H}}));
    if (!H || !S || H % COLUMNS || S % COLUMNS)
        return refused(call, "meshwen: %lld dimensions or %lld positions are no multiple of %d",
                       (long long)H, (long long)S, COLUMNS);
    return 0;
}

// What the arguments of attention say of sequences.
struct sequences {
    const int32_t *query_starts, *lengths, *tables;
    int64_t R, N, W, P, S, window;
};

static int64_t tokens_of(const struct sequences *of, int64_t r) {
    return (int64_t)of->query_starts[r + 1] - of->query_starts[r];
}

// The first position that a token of a sequence sees.
static int64_t first_needed(const struct sequences *of, int64_t r) {
    return larger(of->lengths[r] - tokens_of(of, r) + 1 - of->window, 0);
}

// Whether all that will be read is in the call's buffers.
static error *within_pool(const call *call, const struct sequences *of) {
    if (of->window < 1) return refused(call, "meshwen: the window is empty");
    if (of->query_starts[0] < 0 || of->query_starts[of->R] > of->N)
        return refused(call, "meshwen: sequences have the tokens %d to %d, of %lld",
                       (int)of->query_starts[0], (int)of->query_starts[of->R], (long long)of->N);
    for (int64_t r = 0; r < of->R; r++) {
        const int64_t tokens = tokens_of(of, r), length = of->lengths[r];
        if (tokens < 0) return refused(call, "meshwen: sequence %lld begins behind its end", (long long)r);
        if (length < tokens || quotient_up(length, of->S) > of->W)
            return refused(call, "meshwen: %lld tokens of a sequence of %lld positions in %lld blocks",
                           (long long)tokens, (long long)length, (long long)of->W);
        if (!tokens) continue;
        for (int64_t i = first_needed(of, r) / of->S; i * of->S < length; i++) {
            const int32_t block = of->tables[r * of->W + i];
            if (block < 0 || block >= of->P)
                return refused(call, "meshwen: block %d is not in the pool of %lld", (int)block,
                               (long long)of->P);
        }
    }
    return 0;
}

// Makes the units of all sequences, the last tokens first, as they take longest. Returns how many.
static int64_t make_units(struct paged_unit *units, const struct sequences *of, int64_t K, int64_t most) {
    int64_t count = 0;
    for (int64_t r = 0; r < of->R; r++) {
        const int64_t tokens = tokens_of(of, r), begin = of->lengths[r] - tokens;
        const int64_t parts = quotient_up(tokens, most);
        for (int64_t part = parts - 1; part >= 0; part--) {
            const int64_t from = part * tokens / parts, to = (part + 1) * tokens / parts;
            for (int64_t head = 0; head < K; head++)
                units[count++] = (struct paged_unit){
                    .sequence = r,
                    .head = head,
                    .token = of->query_starts[r] + from,
                    .tokens = to - from,
                    .position = begin + from,
                };
        }
    }
    return count;
}

// Tokens that belong to no sequence have zeros.
static void fill_rest(float *y, const struct sequences *of, int64_t numbers) {
    const int64_t begin = of->query_starts[0], end = of->query_starts[of->R];
    memset(y, 0, (size_t)(begin * numbers) * sizeof *y);
    memset(y + end * numbers, 0, (size_t)((of->N - end) * numbers) * sizeof *y);
}

// See `paged.h`.
EXPORTED error *meshwen_paged_attention(call *call) {
    if (described(call)) return 0;
    const struct instruction_set *set;
    int64_t threads;
    TRY(counted(call, 7, 1));
    TRY(asked(call, &set, &threads));
    const buffer *q = argument(call, 0), *keys = argument(call, 1), *values = argument(call, 2);
    const buffer *starts = argument(call, 3), *lengths = argument(call, 4);
    const buffer *tables = argument(call, 5), *window = argument(call, 6), *y = result(call, 0);
    TRY(checked_pool(call, keys, values));
    const int64_t K = keys->dims[1], H = keys->dims[2];
    TRY(checked(call, q, (struct expected){"q", F32, 3, {ANY, ANY, ANY}}));
    const int64_t N = q->dims[0], heads = q->dims[1], h = q->dims[2];
    TRY(checked(call, lengths, (struct expected){"lengths", S32, 1, {ANY}}));
    const int64_t R = lengths->dims[0];
    TRY(checked(call, starts, (struct expected){"query_starts", S32, 1, {R + 1}}));
    TRY(checked(call, tables, (struct expected){"tables", S32, 2, {R, ANY}}));
    TRY(checked(call, window, (struct expected){"window", S32, 1, {1}}));
    TRY(checked(call, y, (struct expected){"the result", F32, 3, {N, heads, h}}));
    const struct sequences sequences = {
        .query_starts = starts->data,
        .lengths = lengths->data,
        .tables = tables->data,
        .R = R,
        .N = N,
        .W = tables->dims[1],
        .P = keys->dims[0],
        .S = keys->dims[3],
        .window = *(const int32_t *)window->data,
    };
    TRY(within_pool(call, &sequences));
    if (!N || !heads || !h) return 0;
    if (!K || heads % K)
        return refused(call, "meshwen: %lld heads do not share %lld", (long long)heads, (long long)K);
    if (h > H) return refused(call, "meshwen: %lld dimensions are not in %lld", (long long)h, (long long)H);
    fill_rest(y->data, &sequences, heads * h);
    struct paged_unit *units = allocate(N * K * (int64_t)sizeof *units);
    if (!units) return out_of_memory(call);
    const int64_t most = larger(UNIT_ROWS / (heads / K), 1);
    const int64_t count = make_units(units, &sequences, K, most);
    const struct paged_attention task = {
        .q = q->data,
        .keys = keys->data,
        .values = values->data,
        .y = y->data,
        .tables = tables->data,
        .units = units,
        .count = count,
        .threads = threads,
        .window = sequences.window,
        .K = K,
        .G = heads / K,
        .h = h,
        .H = H,
        .S = sequences.S,
        .W = sequences.W,
    };
    unit_function *function = keys->dtype == F32 ? set->floats->paged_float32 : set->floats->paged_bfloat16;
    error *error = count ? parallel(call, function, &task, count, threads) : 0;
    release(units);
    return error;
}

// What is written to a pool, and where.
struct writes {
    char *keys, *values;
    const char *new_keys, *new_values; // [N, K, h]
    const int32_t *slots;
    int64_t N, K, h, H, S;
};

// The keys and values of one head, of one token after the other: of those with the same slot the last
// stays. Behind them come zeros.
static inline void write_head(const struct writes *of, int64_t head, int64_t bytes) {
    static const char zero[4];
    const int64_t K = of->K, S = of->S, H = of->H, h = of->h;
    for (int64_t n = 0; n < of->N; n++) {
        const int64_t slot = of->slots[n], within = slot % S;
        if (slot < 0) continue;
        const int64_t block = (slot / S * K + head) * H * S, from = (n * K + head) * h * bytes;
        char *key = of->keys + (block + within) * bytes;
        char *value = of->values + (block + within * H) * bytes;
        for (int64_t d = 0; d < H; d++)
            memcpy(key + d * S * bytes, d < h ? of->new_keys + from + d * bytes : zero, (size_t)bytes);
        memcpy(value, of->new_values + from, (size_t)(h * bytes));
        memset(value + h * bytes, 0, (size_t)((H - h) * bytes));
    }
}

static int write_float32(const void *task, int64_t head) {
    write_head(task, head, 4);
    return 1;
}

static int write_bfloat16(const void *task, int64_t head) {
    write_head(task, head, 2);
    return 1;
}

// Writes keys and values of tokens, [N, K, h], to a pool, in place: the results are the arguments' memory.
// slots int32 [N]: block * S + offset, or -1, which is not written.
EXPORTED error *meshwen_write_cache(call *call) {
    if (described(call)) return 0;
    const struct instruction_set *set; // Numbers are moved alike by all.
    int64_t threads;
    TRY(counted(call, 5, 2));
    TRY(asked(call, &set, &threads));
    const buffer *keys = argument(call, 0), *values = argument(call, 1), *slots = argument(call, 4);
    const buffer *new_keys = argument(call, 2), *new_values = argument(call, 3);
    TRY(checked_pool(call, keys, values));
    const int64_t P = keys->dims[0], K = keys->dims[1], H = keys->dims[2], S = keys->dims[3];
    const XLA_FFI_DataType dtype = keys->dtype;
    TRY(checked(call, new_keys, (struct expected){"new keys", dtype, 3, {ANY, K, ANY}}));
    const int64_t N = new_keys->dims[0], h = new_keys->dims[2];
    TRY(checked(call, new_values, (struct expected){"new values", dtype, 3, {N, K, h}}));
    TRY(checked(call, slots, (struct expected){"slots", S32, 1, {N}}));
    TRY(checked(call, result(call, 0), (struct expected){"the written keys", dtype, 4, {P, K, H, S}}));
    TRY(checked(call, result(call, 1), (struct expected){"the written values", dtype, 4, {P, K, S, H}}));
    if (result(call, 0)->data != keys->data || result(call, 1)->data != values->data)
        return refused(call, "meshwen: the cache is not written in place");
    if (h > H) return refused(call, "meshwen: %lld dimensions are not in %lld", (long long)h, (long long)H);
    const struct writes writes = {
        .keys = keys->data,
        .values = values->data,
        .new_keys = new_keys->data,
        .new_values = new_values->data,
        .slots = slots->data,
        .N = N,
        .K = K,
        .h = h,
        .H = H,
        .S = S,
    };
    for (int64_t n = 0; n < N; n++)
        if (writes.slots[n] < -1 || writes.slots[n] / S >= P)
            return refused(call, "meshwen: slot %d is not in the pool of %lld blocks",
                           (int)writes.slots[n], (long long)P);
    if (!N || !K) return 0;
    // A few tokens are written sooner than another thread is woken.
    return parallel(call, dtype == F32 ? write_float32 : write_bfloat16, &writes, K,
                    N * K * h < WRITTEN_ALONE ? 1 : threads);
}
