// Numbers of a lane and of a warp, and powers of two.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

KVC_DEVICE float sum_lanes(float x) {
    KVC_UNROLL
    for (int lanes = 16; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

KVC_DEVICE float largest_lane(float x) {
    KVC_UNROLL
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

KVC_DEVICE float between(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// 2^n for |n| up to 100.
KVC_DEVICE float power_of_two(int n) {
    union {
        uint32_t bits;
        float number;
    } power{static_cast<uint32_t>(127 + n) << 23};
    return power.number;
}

// The power of two that brings x to 2^top ... 2^(top + 1). With 14, half a half's range is left, and small numbers keep
// their digits.
KVC_DEVICE int up_to_top(float x, int top = 14) {
    union {
        float number;
        uint32_t bits;
    } whole{x};
    const int up = top - (static_cast<int>(whole.bits >> 23) - 127);
    return up > 100 ? 100 : up < -100 ? -100 : up;
}

}  // namespace kvcompress::cuda
