// Rotary position embedding of a tile of tokens, channels outside tokens, as kvcompress/codec/rope.py specifies it.
#pragma once

#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// cosine and sine [frequency][tile] of the angles of tokens first_position, first_position + 1, ..., times amplitude.
//
// The angle is the float32 product that models and codecs rotate by, rounding included; only its reduction to
// [-pi/4, pi/4] is in double. There the Taylor series end 3e-8 short at most.
inline void rope_tables(const float* frequency, int frequencies, float amplitude, int first_position, float* cosine,
                        float* sine) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer
    for (int f = 0; f < frequencies; ++f, cosine += kTile, sine += kTile) {
        alignas(kAlign) float rest[kTile];
        alignas(kAlign) int32_t quarter[kTile];
        for (int token = 0; token < kTile; ++token) {
            const double angle = static_cast<float>(first_position + token) * frequency[f];
            const double turns = (angle * 0.63661977236758134 + kRound) - kRound;
            rest[token] = static_cast<float>(angle - turns * 1.5707963267948966);
            quarter[token] = static_cast<int32_t>(turns);
        }
        for (int token = 0; token < kTile; token += kLanes) {
            const VecF x = load(rest + token), square = x * x;
            VecF sin = splat(1.f / 362880.f), cos = splat(1.f / 40320.f);
            sin = sin * square - 1.f / 5040.f;
            sin = sin * square + 1.f / 120.f;
            sin = sin * square - 1.f / 6.f;
            sin = sin * square * x + x;
            cos = cos * square - 1.f / 720.f;
            cos = cos * square + 1.f / 24.f;
            cos = cos * square - 0.5f;
            cos = cos * square + 1.f;
            VecI turn;
            std::memcpy(&turn, quarter + token, sizeof turn);
            const VecF across = (turn & 1) != 0 ? cos : sin, along = (turn & 1) != 0 ? sin : cos;
            store(sine + token, ((turn & 2) != 0 ? -across : across) * amplitude);
            store(cosine + token, (((turn + 1) & 2) != 0 ? -along : along) * amplitude);
        }
    }
}

// Turns keys [head_dim][tile] in place; channel f and channel f + head_dim / 2 are one pair.
inline void rotate_tile(float* keys, int head_dim, const float* cosine, const float* sine) {
    float* other = keys + head_dim / 2 * kTile;
    for (int i = 0; i < head_dim / 2 * kTile; i += kLanes) {
        const VecF x = load(keys + i), y = load(other + i), cos = load(cosine + i), sin = load(sine + i);
        store(keys + i, x * cos - y * sin);
        store(other + i, y * cos + x * sin);
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
