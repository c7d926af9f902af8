// The running softmax of a tile of tokens, and of two ranges of them.
#pragma once

#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// Scores of a row to weights p * gain; returns what the row's earlier sums must be multiplied by.
inline float soften(float* scores, const float* k_gain, const float* v_gain, int seen, float& row_max, float& row_sum,
                    float& largest, float& weight_sum) {
    constexpr int kVectors = kTile / kLanes;
    largest = weight_sum = 0;
    if (seen <= 0) {
        std::memset(scores, 0, sizeof(float) * kTile);
        return 1.f;
    }
    const VecF hidden = splat(-__builtin_inff());
    VecF score[kVectors], max = hidden;
    repeat<kVectors>([&](auto i) KVC_LAMBDA { score[i] = load(scores + i * kLanes) * load(k_gain + i * kLanes); });
    if (seen < kTile)
        repeat<kVectors>([&](auto i) KVC_LAMBDA {
            VecI token;
            for (int lane = 0; lane < kLanes; ++lane) token[lane] = i * kLanes + lane;
            // A select, not a product: slots past the end may hold anything.
            score[i] = token < seen ? score[i] : hidden;
        });
    repeat<kVectors>([&](auto i) KVC_LAMBDA { max = max_of(score[i], max); });
    const float tile_max = max_lane(max);
    const float new_max = tile_max > row_max ? tile_max : row_max;
    const float decay = exp_nonpositive(splat(row_max - new_max))[0];
    VecF total = {}, weights = {}, top = {};
    repeat<kVectors>([&](auto i) KVC_LAMBDA {
        const VecF p = exp_nonpositive(score[i] - new_max);
        const VecF weight = p * load(v_gain + i * kLanes);
        total += p;
        weights += weight;
        top = max_of(weight, top);
        store(scores + i * kLanes, weight);
    });
    row_max = new_max;
    row_sum = row_sum * decay + sum(total);
    largest = max_lane(top);
    weight_sum = sum(weights);
    return decay;
}

// Fold the partial results `from` of some rows into those of tokens before them.
inline void merge_rows(int rows, int width, const Partial& into, const Partial& from) {
    for (int row = 0; row < rows; ++row) {
        if (from.sum[row] == 0) continue;  // none of these tokens is visible to the row
        const float max = into.max[row] > from.max[row] ? into.max[row] : from.max[row];
        const float ours = exp_nonpositive(splat(into.max[row] - max))[0];
        const float theirs = exp_nonpositive(splat(from.max[row] - max))[0];
        into.max[row] = max;
        into.sum[row] = into.sum[row] * ours + from.sum[row] * theirs;
        for (int c = 0; c < width; ++c)
            into.latent[row * width + c] = into.latent[row * width + c] * ours + from.latent[row * width + c] * theirs;
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
