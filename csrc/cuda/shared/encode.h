// Encoding latents into records, as kvcompress/codec/scalar.py specifies it: a warp per token and record. A lane takes
// units of eight channels, which are whole bytes in every width, so nobody writes another's.
#pragma once

#include "cuda/core/gain.h"
#include "cuda/shared/records.h"

namespace kvcompress::cuda {

constexpr int kMaxUnits = kMaxRecordTiles * 2;  // of a record

struct StoreArgs {
    Record record;
    uint8_t* data;
    int64_t block_stride;
    int64_t num_slots;
    int block_size, records;
    const float* latents;  // [tokens, records, rank], strides in entries
    int64_t token_stride, record_stride;
    const float* weight;  // [records, rank]
    const int64_t* slots;  // below 0 or outside the cache: none
    int64_t num_tokens;
};

// UNITS of a lane at most.
template <int UNITS>
KVC_KERNEL(kEncodeThreads)
store(KVC_ARGUMENT(StoreArgs) args) {
    const int lane = thread_index() % 32;
    const int64_t number = static_cast<int64_t>(block_x()) * (num_threads() / 32) + thread_index() / 32;
    const int64_t token = number / args.records;
    const int at = static_cast<int>(number % args.records);
    if (token >= args.num_tokens) return;
    const int64_t slot = args.slots[token];
    if (slot < 0 || slot >= args.num_slots) return;
    const Record& record = args.record;
    const float* latents = args.latents + token * args.token_stride + at * args.record_stride;
    const float* weights = args.weight + static_cast<int64_t>(at) * record.rank;
    uint8_t* target = args.data + slot / args.block_size * args.block_stride +
                      (static_cast<int64_t>(at) * args.block_size + slot % args.block_size) * record.token_bytes;

    Channels<kGroup * UNITS> own;
    int offset[UNITS];
    KVC_UNROLL
    for (int n = 0; n < UNITS; ++n) {
        const int unit = lane + 32 * n, channel = kGroup * unit;
        const bool there = channel < record.rank;
        int tile = 0;
        while (tile + 1 < record.num_tiles && record.tiles[tile + 1].channel <= channel) ++tile;
        const Tile& it = record.tiles[tile];
        offset[n] = it.offset + (channel - it.channel) * it.bits / 8;
        KVC_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const int c = kGroup * n + i;
            own.latent[c] = there ? finite(latents[channel + i]) : 0;
            own.weight[c] = there ? weights[channel + i] : 0;
            own.step[c] = there ? it.step : 0;
            own.bits[c] = there ? it.bits : 0;
        }
    }
    float gain = 1;
    if (record.gain_offset >= 0) {
        int exact[kMaxOutliers] = {};
        const uint16_t half = float_to_half(best_gain(record.rank, 0, own, lane, exact));
        if (lane == 0) *reinterpret_cast<uint16_t*>(target + record.gain_offset) = half;
        gain = half_to_float(half);
    }
    KVC_UNROLL
    for (int n = 0; n < UNITS; ++n) {
        const int bits = own.bits[kGroup * n];
        uint32_t word = 0;
        KVC_UNROLL
        for (int i = 0; i < kGroup; ++i) {
            const int c = kGroup * n + i;
            if (bits == 0) continue;
            const uint32_t code = bits == 16
                                      ? float_to_half(between(own.latent[c], -kHalfMax, kHalfMax))
                                      : static_cast<uint32_t>(nearest_code(own.latent[c], gain, own.step[c], bits));
            // Sixteen bits at a time, as records are aligned.
            const int bit = bits * i % 16;
            word |= code << bit;
            if (bit + bits != 16) continue;
            reinterpret_cast<uint16_t*>(target + offset[n])[bits * i / 16] = static_cast<uint16_t>(word);
            word = 0;
        }
    }
}

}  // namespace kvcompress::cuda
