// Launches of the kernels that encode and decode tokens (encode.cu), and what they are told.
#pragma once

#include "cuda/core/pages.h"

namespace kvcompress::cuda {

constexpr int kMaxRank = 256, kUsualRank = 128;  // kernels of their own: channels of a token take registers
constexpr int kMaxOutliers = 2;

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// [tokens, heads, head_dim], strides in entries.
struct TokenRows {
    const void* data;
    int64_t token_stride, head_stride;
    int dtype;
};

KVC_DEVICE float load_entry(const TokenRows& rows, int64_t token, int head, int d) {
    const int64_t at = token * rows.token_stride + head * rows.head_stride + d;
    if (rows.dtype == kFloat32) return static_cast<const float*>(rows.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(rows.data)[at];
    if (rows.dtype == kFloat16) return half_to_float(bits);
    union {
        uint32_t bits;
        float number;
    } wide{static_cast<uint32_t>(bits) << 16};
    return wide.number;
}

KVC_DEVICE void store_entry(void* rows, int dtype, int64_t at, float x) {
    if (dtype == kFloat32) {
        static_cast<float*>(rows)[at] = x;
    } else if (dtype == kFloat16) {
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

struct EncodeSide {
    TokenRows rows;
    const float *mean, *encode, *weight;  // [heads, head_dim], [heads, head_dim, rank], [heads, rank]
};

struct EncodeArgs {
    Pages pages;
    EncodeSide k, v;
    const int64_t* slots;  // of single tokens; below 0: none
    const int64_t* blocks; // of whole blocks of tokens, in their order
    int64_t num_tokens;
    int64_t num_slots;  // of the cache
    int head_dim;
};

struct GatherArgs {
    Pages pages;
    void *keys, *values;  // [tokens, heads, rank], contiguous
    int dtype;
    const int32_t* table;  // of one request
    int num_tokens;
};

// Tokens into their slots.
int start_append(const EncodeArgs& args, void* stream);

// Whole blocks of tokens.
int start_compress(const EncodeArgs& args, void* stream);

int start_gather(const GatherArgs& args, void* stream);

}  // namespace kvcompress::cuda
