// Pages back to normalized latents, for a prefill that attends to many cached tokens with ordinary kernels.
#pragma once

#include "cuda/heads/encode.h"

namespace kvcompress::cuda {

// A block per chunk, head and side.
KVC_KERNEL(kEncodeThreads) gather(KVC_ARGUMENT(GatherArgs) args) {
    const int head = block_y();
    const bool keys = block_z() == 0;
    const Side& side = keys ? args.pages.k : args.pages.v;
    const int mask = (1 << args.pages.page_shift) - 1;
    const uint8_t* chunk = chunk_at(args.pages, args.table[block_x() >> args.pages.page_shift], block_x() & mask, head);
    const int first = block_x() * kChunk;
    for (int i = thread_index(); i < kChunk * side.rank; i += num_threads()) {
        const int token = i / side.rank, channel = i % side.rank;
        if (first + token >= args.num_tokens) return;
        const Tile& tile = side.tiles[tile_of(side, channel)];
        const Place place = place_of(keys, tile.bits, token, channel % kGroup);
        const int at = tile.offset + (channel - tile.channel) / kGroup * unit_bytes(tile.bits) + place.byte;
        const uint32_t bits = *reinterpret_cast<const uint32_t*>(chunk + at) >> place.bit & ((1u << tile.bits) - 1);
        float x;
        if (tile.bits == 16) {
            x = half_to_float(static_cast<uint16_t>(bits));
        } else {
            const int entry = token_entry(token);
            const float gain = half_to_float(reinterpret_cast<const uint16_t*>(chunk + side.gain_offset)[entry]);
            x = value_of(static_cast<float>(bits), tile.step, tile.bits) * gain;
            for (int n = 0; n < side.outliers; ++n)
                if (chunk[side.channel_offset + entry * side.outliers + n] == channel)
                    x += half_to_float(
                        reinterpret_cast<const uint16_t*>(chunk + side.outlier_offset)[entry * side.outliers + n]);
        }
        store_entry(keys ? args.keys : args.values, args.dtype,
                    (static_cast<int64_t>(first + token) * args.pages.num_heads + head) * side.rank + channel, x);
    }
}

}  // namespace kvcompress::cuda
