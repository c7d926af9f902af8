// Records whose tokens are whole, a gain and then codes (kvcompress/codec/shared/pages.py): stripes of a latent that
// layers share, and keys of the layer's own heads. Sixteen tokens' records lie together wherever blocks are cut: a run.
//
// Tiles of sixteen channels are as wide as a tensor core is deep. The lanes 4 g + t of a token's row g take channels
// 4 t ... 4 t + 3 of a tile, neighbours in memory, as the depths 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: what a tile is
// multiplied by has its depths in the same order.
#pragma once

#include "kvcompress/shared.h"

#include "cuda/core/codes.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {

constexpr int kRun = 16;
constexpr int kTileChannels = 16;
constexpr int kMaxStripes = KVC_SHARED_CUDA_MAX_STRIPES;
constexpr int kMaxRecordTiles = KVC_SHARED_CUDA_MAX_TILES;
constexpr int kReadBeyond = 16;  // bytes behind a record that reading its last tile may touch

struct Record {
    int rank, token_bytes;
    int gain_offset;  // -1 for 16-bit channels
    int widest;  // bits
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

// The channel of a tile that has depth or row n, 0 <= n < 16.
KVC_BOTH int channel_of(int n) { return 4 * (n % 8 / 2) + 2 * (n / 8) + n % 2; }

}  // namespace kvcompress::cuda
