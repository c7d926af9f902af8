// Encoding tokens of one head.
#pragma once

#include "cpu/core/encode.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

static_assert(kAppendTokens <= kMatrixRows);

inline void encode_side(const kvc_heads_append_args& args, const kvc_side& side, const kvc_rows& rows, int64_t first,
                        int count, int head, const kvc_heads_encoder& encoder, float* scratch) {
    const kvc_heads_pages& pages = args.pages;
    const int head_dim = pages.head_dim;
    float *x = scratch, *latent = x + kAppendTokens * kMaxHeadDim, *rest = latent + kAppendTokens * kMaxHeadDim;
    for (int i = 0; i < count; ++i) {
        load_row(rows, first + i, head, head_dim, x + i * kMaxHeadDim);
        for (int d = 0; d < head_dim; ++d) x[i * kMaxHeadDim + d] -= encoder.mean_HD[head * head_dim + d];
    }
    const float* encode = encoder.encode_HDR + static_cast<int64_t>(head) * head_dim * side.rank;
    rows_times_matrix(x, count, kMaxHeadDim, encode, head_dim, side.rank, latent, kMaxHeadDim);
    for (int i = 0; i < count; ++i) {
        const int64_t slot = args.slots[first + i];
        if (slot < 0) continue;
        uint8_t* record = pages.data + slot / pages.block_size * pages.block_stride + head * pages.head_stride;
        encode_latent(side, latent + i * kMaxHeadDim, encoder.weight_HR + head * side.rank, record,
                      static_cast<int>(slot % pages.block_size), rest);
    }
}

size_t append_scratch_bytes(const kvc_heads_append_args&) {
    return sizeof(float) * (2 * kAppendTokens + 8) * kMaxHeadDim;
}

void append(const kvc_heads_append_args& args, int64_t first, int count, int head, void* scratch) {
    auto* floats = static_cast<float*>(scratch);
    const kvc_heads_pages& pages = args.pages;
    encode_side(args, pages.k, args.keys, first, count, head, args.k, floats);
    encode_side(args, pages.v, args.values, first, count, head, args.v, floats);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
