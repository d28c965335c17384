// SPDX-License-Identifier: Apache-2.0
//
// Scores of positions as weights, pass by pass: their exponentials less the largest so far
// (arXiv 1805.02867).

#ifndef MESHWEN_SOFTMAX_H
#define MESHWEN_SOFTMAX_H

#include <float.h>

#include "kernels.h"
#include "vec.h"

#define WIDE 16 // positions whose weights are summed in one order
#define PARTS (WIDE / LANES)

// What is known of a row of queries: the largest score so far, and the sum of the weights.
struct row_state {
    float largest, sum;
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

// x, and `other` at the positions from `position` on that do not lie from `first` to `last`.
INLINE floats where_seen(int64_t position, int64_t first, int64_t last, floats x, float other) {
    if (position >= first && position + LANES - 1 <= last) return x; // Most are of this kind.
    return blend(seen(position, first, last), x, all(other));
}

// Turns a row's scores of the positions `from` to `to` (multiples of 16) into weights. Returns what the
// row's result so far has to be multiplied by.
static float weigh(float *scores, int64_t begin, int64_t from, int64_t to, int64_t first, int64_t last,
                   struct row_state *row) {
    floats top = all(-FLT_MAX);
    for (int64_t s = from; s < to; s += LANES) {
        floats score = where_seen(s, first, last, load(scores + s - begin), -FLT_MAX);
        top = blend(score > top, score, top); // A NaN may be lost: its weight is NaN all the same.
    }
    const float before = row->largest, largest = largest_of(top, before);
    floats sums[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) sums[i] = all(0.0f);
    for (int64_t s = from; s < to; s += WIDE) {
        UNROLL for (int i = 0; i < PARTS; i++) {
            float *at = scores + s - begin + i * LANES;
            floats weight = exponential(load(at) - all(largest));
            weight = where_seen(s + i * LANES, first, last, weight, 0.0f);
            store(at, weight);
            sums[i] = sums[i] + weight;
        }
    }
    const float scale = exponential(all(before - largest))[0];
    row->largest = largest;
    row->sum = row->sum * scale + sum_of(sums);
    return scale;
}

#endif
