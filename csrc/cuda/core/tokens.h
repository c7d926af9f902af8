// Rows of tokens in any of the number formats.
#pragma once

#include "kvcompress/common.h"

#include "cuda/core/device.h"

namespace kvcompress::cuda {

// [tokens, heads, head_dim], strides in entries.
struct TokenRows {
    const void* data;
    int64_t token_stride, head_stride;
    int dtype;
};

KVC_DEVICE float load_entry(const TokenRows& rows, int64_t token, int head, int d) {
    const int64_t at = token * rows.token_stride + head * rows.head_stride + d;
    if (rows.dtype == KVC_FLOAT32) return static_cast<const float*>(rows.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(rows.data)[at];
    if (rows.dtype == KVC_FLOAT16) return half_to_float(bits);
    union {
        uint32_t bits;
        float number;
    } wide{static_cast<uint32_t>(bits) << 16};
    return wide.number;
}

KVC_DEVICE void store_entry(void* rows, int dtype, int64_t at, float x) {
    if (dtype == KVC_FLOAT32) {
        static_cast<float*>(rows)[at] = x;
    } else if (dtype == KVC_FLOAT16) {
        static_cast<uint16_t*>(rows)[at] = float_to_half(x);
    } else {
        union {
            float number;
            uint32_t bits;
        } wide{x};
        // Nearest, ties to even; NaN stays NaN.
        const uint32_t rounded = wide.bits + 0x7fff + (wide.bits >> 16 & 1);
        static_cast<uint16_t*>(rows)[at] = static_cast<uint16_t>((x != x ? wide.bits | 0x400000 : rounded) >> 16);
    }
}

}  // namespace kvcompress::cuda
