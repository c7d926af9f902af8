// Keys in the accumulators of a tensor core, from sums of products to scores. A lane 4 g + t holds rows (tokens) g and
// g + 8, columns 2 t and 2 t + 1 of every eight: of a rotation, half a key apart, it has both channels.
#pragma once

#include "cuda/core/rope.h"
#include "cuda/shared/score_rows.h"

namespace kvcompress::cuda {

// Keys of one token, row g + 8 R of the products, in their true size, rotated, times a power of two that makes halves of
// them; what undoes that.
template <int R, int COLUMNS>
KVC_DEVICE float finish_keys(float (&key)[COLUMNS][4], float unit, const float* means, const float* frequencies,
                             float position, int t) {
    float largest = 0;
    KVC_UNROLL
    for (int column = 0; column < COLUMNS; ++column) {
        const float2 mean = reinterpret_cast<const float2*>(means)[4 * column + t];
        float &x = key[column][2 * R], &y = key[column][2 * R + 1];
        x = fmaf(x, unit, mean.x), y = fmaf(y, unit, mean.y);
        largest = fmaxf(largest, fmaxf(fabsf(x), fabsf(y)));
    }
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const int up = up_to_top(largest);
    const float scale = power_of_two(up);
    KVC_UNROLL
    for (int column = 0; column < COLUMNS / 2; ++column) {
        const float2 frequency = reinterpret_cast<const float2*>(frequencies)[4 * column + t];
        KVC_UNROLL
        for (int e = 0; e < 2; ++e) {
            const float2 turn = rotation(position, e ? frequency.y : frequency.x);
            float &x = key[column][2 * R + e], &y = key[column + COLUMNS / 2][2 * R + e];
            const float c = turn.x * scale, s = turn.y * scale, turned = x * c - y * s;
            y = y * c + x * s;
            x = turned;
        }
    }
    return power_of_two(-up);
}

// Scores of sixteen tokens, whose keys become the first operand, and all rows.
template <int COLUMNS>
KVC_DEVICE void score_keys(const ScoreArgs& args, const ScoreRows& rows, const float (&key)[COLUMNS][4], int first,
                           float unit0, float unit1, const uint8_t* shared) {
    constexpr int kTiles = COLUMNS / 2;
    uint32_t a[kTiles][4];
    KVC_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
        const float (&low)[4] = key[2 * tile];
        const float (&high)[4] = key[2 * tile + 1];
        a[tile][0] = halves_of(low[0], low[1]), a[tile][1] = halves_of(low[2], low[3]);
        a[tile][2] = halves_of(high[0], high[1]), a[tile][3] = halves_of(high[2], high[3]);
    }
    const auto* queries = reinterpret_cast<const uint2*>(shared + args.query_at) + thread_index() % 32;
    KVC_ROLLED
    for (int row_tile = 0; kRows * row_tile < rows.count; ++row_tile, queries += 32 * kTiles) {
        float s[4] = {};
        KVC_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint2 q = queries[32 * tile];
            const uint32_t b[2] = {q.x, q.y};
            mma(s, a[tile][0], a[tile][1], a[tile][2], a[tile][3], b);
        }
        write_scores(args, rows, row_tile, first, unit0, unit1, s, shared);
    }
}

}  // namespace kvcompress::cuda
