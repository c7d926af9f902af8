// Encoding tokens, as kvcompress/codec/scalar.py specifies it: a block projects a few tokens of one head and side, then
// each warp finds the gains of its tokens and stores their codes. Codes of several tokens share a word, so they are
// stored by flipping the bits that change: what another block stores in the same word stays.
#pragma once

#include "cuda/core/gain.h"
#include "cuda/heads/fragments.h"
#include "cuda/heads/tokens.h"

namespace kvcompress::cuda {

// Nobody else writes these bits, others may write the rest of the word.
KVC_DEVICE void store_bits(uint8_t* word_at, int bit, int bits, uint32_t value) {
    auto* word = reinterpret_cast<uint32_t*>(word_at);
    const uint32_t mask = ((1u << bits) - 1) << bit;
    const uint32_t change = (*static_cast<volatile uint32_t*>(word) ^ value << bit) & mask;
    if (change) flip_bits(word, change);
}

// One token's latents into its chunk, by one warp.
template <int COUNT>
KVC_DEVICE void store_token(const Side& side, const Channels<COUNT>& x, const Place (&place)[COUNT], uint8_t* chunk,
                            int token, int lane) {
    if (side.gain_offset < 0) {
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            if (x.bits[i])
                store_bits(chunk + place[i].byte, place[i].bit, 16,
                           float_to_half(between(x.latent[i], -kHalfMax, kHalfMax)));
        return;
    }
    int exact[kMaxOutliers] = {};
    const uint16_t gain = float_to_half(best_gain(side.rank, side.outliers, x, lane, exact));
    const float rounded = half_to_float(gain);
    const int entry = token_entry(token);
    if (lane == 0) reinterpret_cast<uint16_t*>(chunk + side.gain_offset)[entry] = gain;
    KVC_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        if (!x.bits[i]) continue;
        const float code = nearest_code(x.latent[i], rounded, x.step[i], x.bits[i]);
        store_bits(chunk + place[i].byte, place[i].bit, x.bits[i], static_cast<uint32_t>(code));
        KVC_UNROLL
        for (int n = 0; n < kMaxOutliers; ++n) {
            if (n >= side.outliers || exact[n] != 32 * i + lane) continue;
            const float left =
                between(x.latent[i] - value_of(code, x.step[i], x.bits[i]) * rounded, -kHalfMax, kHalfMax);
            reinterpret_cast<uint16_t*>(chunk + side.outlier_offset)[entry * side.outliers + n] = float_to_half(left);
            chunk[side.channel_offset + entry * side.outliers + n] = static_cast<uint8_t>(exact[n]);
        }
    }
}

// The tile a channel is in.
KVC_DEVICE int tile_of(const Side& side, int channel) {
    int tile = 0;
    while (tile + 1 < side.num_tiles && side.tiles[tile + 1].channel <= channel) ++tile;
    return tile;
}

// TOKENS tokens of one head and side. WHOLE: the block's part of a chunk's tokens goes to shared memory first, and from
// there to the page in wide stores; all of its tokens are new. A side has at most RANK channels.
template <int TOKENS, bool WHOLE, int RANK>
KVC_KERNEL(kEncodeThreads)
encode(KVC_ARGUMENT(EncodeArgs) args) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int head = block_y(), head_dim = args.head_dim;
    const bool keys = block_z() == 0;
    const Side& side = keys ? args.pages.k : args.pages.v;
    const EncodeSide& codec = keys ? args.k : args.v;
    const float* matrix = codec.encode + static_cast<int64_t>(head) * head_dim * side.rank;
    auto* x = reinterpret_cast<float*>(shared_memory());  // [head_dim][TOKENS]
    float* latents = x + head_dim * TOKENS;  // [TOKENS][rank]
    auto* image = reinterpret_cast<uint8_t*>(latents + TOKENS * side.rank);  // of the chunk
    const int64_t first = static_cast<int64_t>(block_x()) * (WHOLE ? kChunk : TOKENS);
    if (WHOLE)
        for (int i = thread_index(); i < args.pages.chunk_bytes / 4; i += num_threads())
            reinterpret_cast<uint32_t*>(image)[i] = 0;
    for (int64_t start = first; start < first + (WHOLE ? kChunk : 1); start += TOKENS) {
        sync_block();
        for (int i = thread_index(); i < head_dim * TOKENS; i += num_threads()) {
            const int d = i % head_dim, n = i / head_dim;
            const int64_t token = start + n;
            x[d * TOKENS + n] =
                token < args.num_tokens ? load_entry(codec.rows, token, head, d) - codec.mean[head * head_dim + d] : 0;
        }
        sync_block();
        for (int channel = thread_index(); channel < side.rank; channel += num_threads()) {
            float sums[TOKENS] = {};
            for (int d = 0; d < head_dim; ++d) {
                const float entry = matrix[d * side.rank + channel];
                KVC_UNROLL
                for (int n = 0; n < TOKENS; ++n) sums[n] += x[d * TOKENS + n] * entry;
            }
            KVC_UNROLL
            for (int n = 0; n < TOKENS; ++n) latents[n * side.rank + channel] = sums[n];
        }
        sync_block();
        for (int n = warp; n < TOKENS; n += warps) {
            const int64_t token = start + n;
            if (token >= args.num_tokens) continue;
            const int64_t slot = WHOLE ? token % kChunk : args.slots[token];
            if (slot < 0 || slot >= args.num_slots) continue;
            const int within = static_cast<int>(slot % kChunk);
            // Channels lane, lane + 32, ...
            Channels<RANK / 32> own;
            Place places[RANK / 32];
            KVC_UNROLL
            for (int i = 0; i < RANK / 32; ++i) {
                const int channel = 32 * i + lane;
                own.latent[i] = own.weight[i] = own.step[i] = 0;
                own.bits[i] = 0;
                if (channel >= side.rank) continue;
                const Tile& tile = side.tiles[tile_of(side, channel)];
                const int unit = (channel - tile.channel) / kGroup;
                own.latent[i] = finite(latents[n * side.rank + channel]);
                own.weight[i] = codec.weight[head * side.rank + channel];
                own.step[i] = tile.step, own.bits[i] = tile.bits;
                places[i] = place_of(keys, tile.bits, within, channel % kGroup);
                places[i].byte += tile.offset + unit * unit_bytes(tile.bits);
            }
            uint8_t* chunk = image;
            if (!WHOLE) {
                const int64_t number = slot / kChunk;
                const int mask = (1 << args.pages.page_shift) - 1;
                chunk = chunk_at(args.pages, number >> args.pages.page_shift, static_cast<int>(number & mask), head);
            }
            store_token(side, own, places, chunk, within, lane);
        }
    }
    if (!WHOLE) return;
    sync_block();
    const int mask = (1 << args.pages.page_shift) - 1;
    uint8_t* chunk = chunk_at(args.pages, args.blocks[block_x() >> args.pages.page_shift], block_x() & mask, head);
    const auto copy = [&](int offset, int bytes) {
        for (int i = thread_index(); i < bytes / 16; i += num_threads())
            reinterpret_cast<uint4*>(chunk + offset)[i] = reinterpret_cast<const uint4*>(image + offset)[i];
    };
    int code_bytes = 0;
    for (int tile = 0; tile < side.num_tiles; ++tile)
        code_bytes += side.tiles[tile].units * unit_bytes(side.tiles[tile].bits);
    if (side.gain_offset >= 0) copy(side.gain_offset, 2 * kChunk);
    if (side.outliers)
        copy(side.outlier_offset, 2 * kChunk * side.outliers), copy(side.channel_offset, kChunk * side.outliers);
    copy(side.tiles[0].offset, code_bytes);
}

}  // namespace kvcompress::cuda
