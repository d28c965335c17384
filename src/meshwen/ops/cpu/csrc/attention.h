// SPDX-License-Identifier: Apache-2.0
//
// Attention of tokens that follow one another over the part of the KV cache that each of them sees.
//
//   q float32 [B, K * G, T, H], scaled; keys [C, K, H, S] and values [C, K, S, H], both float32 or both
//   bfloat16; rows int32 [B], of the cache; starts int32 [B]; window int32 [1]; y as q.
//   H and S are multiples of 32.
//
// Token t of sequence b is at position starts[b] + t, and sees up to `window` positions, its own the
// last. Positions are taken in passes of 512, whose scores stay in the nearest cache: scores, their
// exponentials less the largest so far (arXiv 1805.02867), then values, added with these weights.
// Passes, and vectors of 16 positions in them, begin at multiples of their size, and what a token does
// not see has the weight 0: so a token's result has the same bits whatever other tokens are attended to
// at once, as long as values are finite.

#ifndef MESHWEN_ATTENTION_H
#define MESHWEN_ATTENTION_H

#include <float.h>

#include "kernels.h"
#include "matmul.h"
#include "tile.h"

#define PASS 512       // positions
#define SHORT_SUM 16   // dimensions: scores are large beside what tells them apart
#define WIDE 16        // positions whose weights are summed in one order
#define PARTS (WIDE / LANES)

// What is known of a row of queries: the largest score so far, and the sum of the weights.
struct row_state {
    float largest, sum;
};

// The positions of a pass, for all rows of a head.
struct pass {
    int64_t begin;
    const char *keys;   // of the position `begin`, [H, S]
    const char *copied; // the same in panels of 32 positions [H, 32], or 0
    const char *values; // of all positions, [S, H]
    float *scores;      // [12, PASS]
    int64_t H, S, window;
    int64_t apart; // positions between one row of queries and the next: 0 or 1
};

// The first position that a token sees.
static int64_t first_seen(int64_t position, int64_t window) {
    return larger(position + 1 - window, 0);
}

// e^x for x up to 0, and NaN for NaN. Below e^-87 a float32 would be subnormal. Cephes' `expf`:
// n = x log2(e), rounded; r = x - n ln(2), in two steps; e^r = 1 + r + r^2 (c0 r^5 + ... + c5).
// 1.5 * 2^23 added to x log2(e) rounds it, and leaves n in the lowest bits of the sum. Those of a NaN,
// added to an exponent, could make a number of it. Above 0, at positions that are not seen, the result
// means nothing.
INLINE floats exponential(floats x) {
    const floats shift = all(0x1.8p23f);
    x = blend(x < all(-87.0f), all(-87.0f), x);
    floats shifted = x * all(0x1.715476p0f) + shift;
    floats n = shifted - shift;
    floats r = fused(n, all(-0x1.63p-1f), x);
    r = fused(n, all(0x1.bd0106p-13f), r);
    floats p = fused(all(0x1.a0d2cep-13f), r, all(0x1.6e879cp-10f));
    p = fused(p, r, all(0x1.11121p-7f));
    p = fused(p, r, all(0x1.555382p-5f));
    p = fused(p, r, all(0x1.555554p-3f));
    p = fused(p, r, all(0x1p-1f));
    floats e = fused(p, r * r, r) + all(1.0f);
    words bits = (words)e + ((words)shifted << 23);
    return blend(x != x, x, (floats)bits);
}

INLINE float sum_of(const floats parts[PARTS]) {
    float lanes[WIDE];
    UNROLL for (int i = 0; i < PARTS; i++) store(lanes + i * LANES, parts[i]);
    UNROLL for (int half = WIDE / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float largest_of(floats x, float largest) {
    UNROLL for (int i = 0; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// Which of LANES positions, the first of which is `position`, lie from `first` to `last`.
INLINE ints seen(int64_t position, int64_t first, int64_t last) {
    ints place;
    UNROLL for (int i = 0; i < LANES; i++) place[i] = i;
    ints from = (ints)all_bits((uint32_t)(first - position));
    ints to = (ints)all_bits((uint32_t)(last - position));
    return (place >= from) & (place <= to);
}

// Turns a row's scores of the positions `from` to `to` (multiples of 16) into weights. Returns what the
// row's result so far has to be multiplied by.
static float weigh(float *scores, int64_t begin, int64_t from, int64_t to, int64_t first, int64_t last,
                   struct row_state *row) {
    floats top = all(-FLT_MAX);
    for (int64_t s = from; s < to; s += LANES) {
        floats score = blend(seen(s, first, last), load(scores + s - begin), all(-FLT_MAX));
        top = blend(score > top, score, top); // A NaN may be lost: its weight is NaN all the same.
    }
    const float before = row->largest, largest = largest_of(top, before);
    floats sums[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) sums[i] = all(0.0f);
    for (int64_t s = from; s < to; s += WIDE) {
        UNROLL for (int i = 0; i < PARTS; i++) {
            float *at = scores + s - begin + i * LANES;
            floats weight = exponential(load(at) - all(largest));
            weight = blend(seen(s + i * LANES, first, last), weight, all(0.0f));
            store(at, weight);
            sums[i] = sums[i] + weight;
        }
    }
    const float scale = exponential(all(before - largest))[0];
    row->largest = largest;
    row->sum = row->sum * scale + sum_of(sums);
    return scale;
}

// Adds the positions of a pass to up to 12 rows of queries, the first of which is at `position`.
INLINE void attend_block(enum operands kind, tile_function *const *tiles, const struct pass *pass,
                         const float *q, float *y, struct row_state *states, int64_t rows,
                         int64_t position) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = pass->H, S = pass->S, begin = pass->begin;
    const int64_t end = smaller(position + (rows - 1) * pass->apart + 1, begin + PASS);
    const int64_t first = first_seen(position, pass->window), from = larger(first, begin);
    if (from >= end) return;
    float *scores = pass->scores;
    struct tile t = {
        .a_stride = 4 * H,
        .b_stride = pass->copied ? bytes * COLUMNS : bytes * S,
        .y_stride = 4 * PASS,
        .steps = SHORT_SUM,
        .ahead_stride = pass->copied ? 0 : bytes * S,
    };
    for (int64_t j = from / COLUMNS * COLUMNS; j < end; j += COLUMNS) {
        const int64_t offset = (j - begin) * bytes;
        const char *keys = pass->copied ? pass->copied + offset * H : pass->keys + offset;
        t.y = (char *)(scores + j - begin);
        for (int64_t h = 0; h < H; h += SHORT_SUM) {
            t.a = (const char *)(q + h);
            t.b = keys + h * t.b_stride;
            t.x = h ? t.y : nothing;
            t.x_stride = h ? t.y_stride : 0;
            t.ahead = keys + bytes * COLUMNS + h * t.ahead_stride;
            tiles[rows - 1](&t);
        }
    }
    const int is_first = first / PASS * PASS == begin;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t last = position + r * pass->apart;
        const float scale = weigh(scores + r * PASS, begin, from / WIDE * WIDE,
                                  (end + WIDE - 1) / WIDE * WIDE, first_seen(last, pass->window), last,
                                  states + r);
        if (is_first) continue;
        for (int64_t d = 0; d < H; d += LANES)
            store(y + r * H + d, load(y + r * H + d) * all(scale));
    }
    const char *values = pass->values + from * H * bytes;
    t = (struct tile){
        .a = (const char *)(scores + from - begin),
        .a_stride = 4 * PASS,
        .b_stride = bytes * H,
        .y_stride = 4 * H,
        .x_stride = is_first ? 0 : 4 * H,
        .steps = end - from,
        .ahead_stride = bytes * H,
    };
    for (int64_t d = 0; d < H; d += COLUMNS) {
        t.b = values + d * bytes;
        t.ahead = t.b + 16 * bytes * H;
        t.y = (char *)(y + d);
        t.x = is_first ? nothing : t.y;
        tiles[rows - 1](&t);
    }
}

// The keys of the positions from `begin` to `end` in panels of 32, one behind the other.
INLINE void copy_keys(enum operands kind, char *to, const char *keys, int64_t begin, int64_t end,
                      int64_t H, int64_t S) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    for (int64_t j = begin; j < end; j += COLUMNS)
        for (int64_t h = 0; h < H; h++, to += COLUMNS * bytes)
            memcpy(to, keys + (h * S + j) * bytes, kind == FLOAT32 ? 4 * COLUMNS : 2 * COLUMNS);
}

// The unit of work: all queries of a key/value head, of single tokens; else all tokens of a query head.
INLINE int attend_head(enum operands kind, tile_function *const *tiles, const struct attention *of,
                       int64_t unit) {
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, H = of->H, S = of->S, single = of->T == 1;
    const int64_t length = single ? of->G : of->T, head = single ? unit : unit / of->G;
    const int64_t b = head / of->K, k = head % of->K;
    const int64_t start = of->starts[b], offset = (of->rows[b] * of->K + k) * S * H * bytes;
    const float *q = of->q + unit * length * H;
    float *y = of->y + unit * length * H;
    const int64_t blocks = quotient_up(length, MOST_ROWS);
    const int64_t copied_bytes = blocks > 1 ? PASS * H * bytes : 0;
    const int64_t scores_bytes = MOST_ROWS * PASS * sizeof(float);
    char *space = allocate(scores_bytes + copied_bytes + length * sizeof(struct row_state));
    if (!space) return 0;
    char *copied = copied_bytes ? space + scores_bytes : 0;
    struct row_state *states = (struct row_state *)(space + scores_bytes + copied_bytes);
    for (int64_t i = 0; i < length; i++) states[i] = (struct row_state){-FLT_MAX, 0.0f};
    struct pass pass = {
        .copied = copied,
        .values = of->values + offset,
        .scores = (float *)space,
        .H = H,
        .S = S,
        .window = of->window,
        .apart = single ? 0 : 1,
    };
    const int64_t end = start + (length - 1) * pass.apart + 1;
    for (int64_t begin = first_seen(start, of->window) / PASS * PASS; begin < end; begin += PASS) {
        pass.begin = begin;
        pass.keys = of->keys + offset + begin * bytes;
        if (copied)
            copy_keys(kind, copied, of->keys + offset, begin, smaller(begin + PASS, end), H, S);
        for (int64_t block = 0, row = 0; block < blocks; block++) {
            const int64_t rows = quotient_up(length - row, blocks - block);
            attend_block(kind, tiles, &pass, q + row * H, y + row * H, states + row, rows,
                         start + row * pass.apart);
            row += rows;
        }
    }
    for (int64_t r = 0; r < length; r++)
        for (int64_t d = 0; d < H; d += LANES)
            store(y + r * H + d, load(y + r * H + d) / all(states[r].sum));
    release(space);
    return 1;
}

#endif
