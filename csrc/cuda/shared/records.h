// Records whose tokens are whole, a gain and then codes (kvcompress/codec/shared/pages.py): stripes of a latent that
// layers share, and keys of the layer's own heads. Sixteen tokens' records lie together wherever blocks are cut: a run.
//
// Tiles of sixteen channels are as wide as a tensor core is deep. The lanes 4 g + t of a token's row g take channels
// 4 t ... 4 t + 3 of a tile, neighbours in memory, as the depths 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: what a tile is
// multiplied by has its depths in the same order.
#pragma once

#include "cuda/heads/decode.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {

constexpr int kRun = 16;
constexpr int kTileChannels = 16;
constexpr int kMaxStripes = 32;
constexpr int kMaxRecordTiles = 64;
constexpr int kReadBeyond = 16;  // bytes behind a record that reading its last tile may touch

struct Record {
    int rank, token_bytes;
    int gain_offset;  // -1 for 16-bit channels
    int widest;       // bits
    int num_tiles;
    Tile tiles[kMaxRecordTiles];  // offsets are within a token
};

// The records of one layer.
struct Stripe {
    const uint8_t* data;
    int64_t block_stride;
    const int32_t* table;
    int64_t table_stride;
    int block_size;
};

// The run that begins with a request's token.
KVC_DEVICE const uint8_t* run_at(const Record& record, const Stripe& stripe, int request, int head, int token) {
    const int64_t block = stripe.table[request * stripe.table_stride + token / stripe.block_size];
    const int64_t row = static_cast<int64_t>(head) * stripe.block_size + token % stripe.block_size;
    return stripe.data + block * stripe.block_stride + row * record.token_bytes;
}

KVC_DEVICE void copy_run(const Record& record, const uint8_t* run, uint8_t* to, int thread, int threads) {
    for (int at = 16 * thread; at < kRun * record.token_bytes; at += 16 * threads) copy_16_bytes(to + at, run + at);
}

KVC_DEVICE float gain_of(const Record& record, const uint8_t* token) {
    return half_to_float(*reinterpret_cast<const uint16_t*>(token + record.gain_offset));
}

// A lane's four channels of a tile in two pairs: codes less 2^(BITS - 1), exactly; of 16 bits the channels themselves,
// zero where the tile has none. Codes where it has none are of another band, or anything.
template <int BITS>
KVC_DEVICE void unpack_four(const uint8_t* token, const Tile& tile, int t, uint32_t (&pair)[2]) {
    const uint8_t* codes = token + tile.offset;
    if constexpr (BITS == 16) {
        pair[0] = pair[1] = 0;
        if (t >= 2 * tile.units) return;
        const uint2 w = reinterpret_cast<const uint2*>(codes)[t];
        pair[0] = w.x, pair[1] = w.y;
    } else if constexpr (BITS == 8) {
        const auto* words = reinterpret_cast<const uint16_t*>(codes) + 2 * t;
        KVC_UNROLL
        for (int i = 0; i < 2; ++i) pair[i] = fma_halves(bytes_of<0x4140>(words[i], 0x64u), halves_of(1, 1), halves_of(-1152, -1152));
    } else if constexpr (BITS == 4) {
        const uint32_t word = reinterpret_cast<const uint16_t*>(codes)[t] * 0x10001u;
        const uint32_t scale = halves_of(1, 0.0625f), offset = halves_of(-1032, -72);
        pair[0] = fma_halves(mask_or<0x00f0000f, 0x64006400>(word), scale, offset);
        pair[1] = fma_halves(mask_or<0x00f0000f, 0x64006400>(word >> 8), scale, offset);
    } else {
        static_assert(BITS == 2);
        const uint32_t word = codes[t] * 0x10001u;
        const uint32_t scale = halves_of(1, 0.25f), offset = halves_of(-1026, -258);
        pair[0] = fma_halves(mask_or<0x000c0003, 0x64006400>(word), scale, offset);
        pair[1] = fma_halves(mask_or<0x000c0003, 0x64006400>(word >> 4), scale, offset);
    }
}

// The channel of a tile that has depth or row n, 0 <= n < 16.
KVC_BOTH int channel_of(int n) { return 4 * (n % 8 / 2) + 2 * (n / 8) + n % 2; }

}  // namespace kvcompress::cuda
