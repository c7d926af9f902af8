// 16-bit numbers of the latents, their queries and their weights: bfloat16 or halves.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

template <bool BF16>
KVC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    if constexpr (BF16)
        mma_bfloat16(c, a[0], a[1], a[2], a[3], b);
    else
        mma(c, a[0], a[1], a[2], a[3], b);
}

template <bool BF16>
KVC_DEVICE uint32_t pair_of(float low, float high) {
    return BF16 ? bfloats_of(low, high) : halves_of(low, high);
}

template <bool BF16>
KVC_DEVICE float number_of(uint32_t pair, int e) {
    if (!BF16) return half_to_float(static_cast<uint16_t>(e ? pair >> 16 : pair));
    union {
        uint32_t bits;
        float number;
    } wide{e ? pair & 0xffff0000 : pair << 16};
    return wide.number;
}

}  // namespace kvcompress::cuda
