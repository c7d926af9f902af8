// Tokens of one head back from their records: latents, then the decoder, for attention that wants plain keys and values.
#pragma once

#include "float_side.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

static_assert(kGatherTokens <= kMatrixRows && kGroup % kGatherTokens == 0);

// An unpacked token at most: all channels, and the padding of every band.
constexpr int kUnpacked = kMaxHeadDim + KVC_MAX_BANDS * 16 * kLanes;

inline void gather_side(const kvc_pages& pages, const kvc_side& side, const uint8_t* record, int offset, int count, const float* decode_RD,
                        const float* mean_D, const kvc_rows& rows, int64_t first_row, int head, float* scratch) {
    float *unpacked = scratch, *latents = unpacked + kUnpacked, *out = latents + kGatherTokens * kMaxHeadDim;
    for (int i = 0; i < count; ++i) {
        float* latent = latents + i * kMaxHeadDim;
        unpack_value(side, record + side.code_offset + (offset + i) * side.code_bytes, unpacked);
        value_channels(side, unpacked, latent);
        if (side.gain_offset < 0) continue;
        uint16_t half;
        std::memcpy(&half, record + side.gain_offset + 2 * (offset + i), 2);
        const float gain = half_to_float(half);
        for (int c = 0; c < side.rank; ++c) latent[c] *= gain;
        for (int n = 0; n < side.outliers; ++n) {
            const int64_t place = side.outliers * (offset + i) + n;
            const int channel = record[side.channel_offset + place];
            std::memcpy(&half, record + side.outlier_offset + 2 * place, 2);
            // Damaged pages must not become writes elsewhere.
            if (channel < side.rank) latent[channel] += half_to_float(half);
        }
    }
    rows_times_matrix(latents, count, kMaxHeadDim, decode_RD, side.rank, pages.head_dim, out, kMaxHeadDim);
    for (int i = 0; i < count; ++i) {
        for (int d = 0; d < pages.head_dim; ++d) out[i * kMaxHeadDim + d] += mean_D[d];
        store_row(rows, first_row + i, head, pages.head_dim, out + i * kMaxHeadDim);
    }
}

size_t gather_scratch_bytes(const kvc_gather_args&) { return sizeof(float) * (kUnpacked + 2 * kGatherTokens * kMaxHeadDim); }

void gather(const kvc_gather_args& args, int request, int first, int count, int64_t first_row, int head, void* scratch) {
    const kvc_pages& pages = args.pages;
    const int32_t block = args.block_table[request * args.block_table_stride + first / pages.block_size];
    const uint8_t* record = pages.data + block * pages.block_stride + head * pages.head_stride;
    const int offset = first % pages.block_size, head_dim = pages.head_dim;
    auto* floats = static_cast<float*>(scratch);
    gather_side(pages, pages.k, record, offset, count, args.k_decode_HRD + static_cast<int64_t>(head) * pages.k.rank * head_dim,
                args.k_mean_HD + head * head_dim, args.keys, first_row, head, floats);
    gather_side(pages, pages.v, record, offset, count, args.v_decode_HRD + static_cast<int64_t>(head) * pages.v.rank * head_dim,
                args.v_mean_HD + head * head_dim, args.values, first_row, head, floats);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
