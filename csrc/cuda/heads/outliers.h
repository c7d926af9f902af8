// Channels stored exactly: what their codes leave of them, added by ordinary instructions in float32.
#pragma once

#include "cuda/core/pages.h"

namespace kvcompress::cuda {

// Scores of tokens 8 j + g and rows 2 t and 2 t + 1, s[j / 2][2 (j % 2) + ...], gain included. `query` is
// [channels][rows], not multiplied by a step. Numbers beyond the kept channels, of a damaged page, are ignored.
KVC_DEVICE void add_exact_scores(const Side& side, const uint8_t* chunk, const float2* query, int lane,
                                 float (&s)[4][4]) {
    const int g = lane / 4, t = lane % 4;
    const auto* left = reinterpret_cast<const uint16_t*>(chunk + side.outlier_offset) + kPairs * g * side.outliers;
    const uint8_t* channels = chunk + side.channel_offset + kPairs * g * side.outliers;
    KVC_UNROLL
    for (int j = 0; j < kPairs; ++j) KVC_ROLLED
    for (int n = 0; n < side.outliers; ++n) {
        const int channel = channels[j * side.outliers + n];
        if (channel >= side.rank) continue;
        const float x = half_to_float(left[j * side.outliers + n]);
        const float2 q = query[kRows / 2 * channel + t];
        s[j / 2][2 * (j % 2)] += x * q.x, s[j / 2][2 * (j % 2) + 1] += x * q.y;
    }
}

// The warp's own sums [channels][rows]: they decay, and the first `tokens` of the chunk are added with probabilities p.
KVC_DEVICE void add_exact_values(const Side& side, const uint8_t* chunk, int tokens, int lane, const float (&p)[4][4],
                                 float decay0, float decay1, float* sums) {
    const int g = lane / 4, t = lane % 4;
    if (any_lane(decay0 != 1 || decay1 != 1)) KVC_ROLLED
    for (int channel = g; channel < side.rank; channel += kGroup) {
        float2& sum = reinterpret_cast<float2*>(sums)[kRows / 2 * channel + t];
        sum.x *= decay0, sum.y *= decay1;
    }
    sync_warp();
    const auto* left = reinterpret_cast<const uint16_t*>(chunk + side.outlier_offset) + kPairs * g * side.outliers;
    const uint8_t* channels = chunk + side.channel_offset + kPairs * g * side.outliers;
    KVC_UNROLL
    for (int j = 0; j < kPairs; ++j) KVC_ROLLED
    for (int n = 0; n < side.outliers; ++n) {
        const int channel = channels[j * side.outliers + n];
        if (channel >= side.rank || 8 * j + g >= tokens) continue;
        const float x = half_to_float(left[j * side.outliers + n]);
        float* sum = sums + kRows * channel + 2 * t;
        add_shared(sum, p[j / 2][2 * (j % 2)] * x);
        add_shared(sum + 1, p[j / 2][2 * (j % 2) + 1] * x);
    }
    sync_warp();
}

}  // namespace kvcompress::cuda
