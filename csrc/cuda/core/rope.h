// Rotary position embedding, as kvcompress/codec/rope.py specifies it.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

// (cosine, sine) of the angle that models and codecs rotate by: the float32 product, rounding included. Whole turns,
// fewer than 2^22, are taken off exactly, as 2 pi in two parts.
KVC_DEVICE float2 rotation(float position, float frequency) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer
    const float angle = position * frequency;
    const float turns = fmaf(angle, 0.159154943f, kRound) - kRound;
    const float rest = fmaf(turns, 1.74845560e-7f, fmaf(turns, -6.28318548f, angle));
    return {cos_of(rest), sin_of(rest)};
}

}  // namespace kvcompress::cuda
