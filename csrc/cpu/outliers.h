// Channels stored exactly: what their codes leave of them, added to scores and sums beside the codes' own share.
#pragma once

#include "vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// A tile's outliers, those of a token side by side. `left` is divided by the token's gain: scores and weights are in
// units of the gain where it is added.
struct Outliers {
    alignas(kAlign) float left[kTile * KVC_MAX_OUTLIERS];
    uint8_t channel[kTile * KVC_MAX_OUTLIERS];
};

// A group of sixteen tokens, of which those past `tokens` get zeros.
inline void read_outliers(const kvc_side& side, const uint8_t* record, int offset, int tokens, const float* gains, int group, Outliers& out) {
    const int count = side.outliers, entries = count * kGroup, used = count * tokens;
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    alignas(kAlign) uint16_t halves[kGroup * KVC_MAX_OUTLIERS];
    float* left = out.left + group * entries;
    uint8_t* channel = out.channel + group * entries;
    std::memcpy(halves, record + side.outlier_offset + 2 * count * offset, sizeof(uint16_t) * static_cast<size_t>(entries));
    std::memcpy(channel, record + side.channel_offset + count * offset, static_cast<size_t>(entries));
    for (int i = used; i < entries; ++i) halves[i] = 0;
    for (int i = used; i < entries; ++i) channel[i] = 0;
    for (int i = 0; i < entries; i += kLanes) {
        Halves narrow;
        std::memcpy(&narrow, halves + i, sizeof narrow);
        store(left + i, half_to_float(__builtin_convertvector(narrow, VecU)));
    }
    for (int token = 0; token < tokens; ++token)
        for (int n = 0; n < count; ++n) left[token * count + n] /= gains[token];
    // Damaged pages must not become writes outside the sums.
    for (int i = 0; i < used; ++i)
        if (channel[i] >= side.rank) channel[i] = 0, left[i] = 0;
}

template <int COUNT>
KVC_INLINE void score_outliers(const Outliers& outliers, const float* absorbed, int rank, int rows, int tokens, float* scores) {
    for (int row = 0; row < rows; ++row, absorbed += rank, scores += kTile)
        for (int token = 0; token < tokens; ++token)
            repeat<COUNT>([&](auto n) KVC_LAMBDA {
                scores[token] += absorbed[outliers.channel[token * COUNT + n]] * outliers.left[token * COUNT + n];
            });
}

// score[row][token] += query[row][channel] * left
inline void score_outliers(const kvc_side& side, const Outliers& outliers, const float* absorbed, int rows, int tokens, float* scores) {
    if (side.outliers == 1)
        score_outliers<1>(outliers, absorbed, side.rank, rows, tokens, scores);
    else
        score_outliers<2>(outliers, absorbed, side.rank, rows, tokens, scores);
}

// exact[row][channel] = exact * decay[row] + weight[row][token] * left
inline void mix_outliers(const kvc_side& side, const Outliers& outliers, const float* weights, const float* decay, int rows, int tokens, float* exact) {
    for (int row = 0; row < rows; ++row) {
        if (decay[row] == 1) continue;
        for (int c = 0; c < side.rank; ++c) exact[row * side.rank + c] *= decay[row];
    }
    // Rows inside: neighbouring tokens often share a channel, and one addition waits for the other.
    for (int token = 0; token < tokens; ++token)
        for (int n = 0; n < side.outliers; ++n) {
            const float left = outliers.left[token * side.outliers + n];
            float* target = exact + outliers.channel[token * side.outliers + n];
            for (int row = 0; row < rows; ++row) target[row * side.rank] += weights[row * kTile + token] * left;
        }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
