// What kernels need to know of records, from what the C interface is told.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/shared/records.h"

namespace kvcompress::cuda {

inline bool make_record(const kvc_shared_records& from, Record& record) {
    record = {};
    const kvc_side& side = from.side;
    record.rank = side.rank, record.token_bytes = from.token_bytes,
    record.gain_offset = static_cast<int>(side.gain_offset);
    if (side.outliers || from.token_bytes % 2 || !make_tiles(side, 1, kMaxRecordTiles, record.tiles, record.num_tiles))
        return false;
    for (int tile = 0; tile < record.num_tiles; ++tile)
        if (record.tiles[tile].bits > record.widest) record.widest = record.tiles[tile].bits;
    if (record.widest == 16 && (record.tiles[0].offset % 16 || from.token_bytes % 16)) return false;
    const Tile& last = record.tiles[record.num_tiles - 1];
    return last.offset + last.units * last.bits <= from.token_bytes;
}

// Copies are of 16 bytes, from the beginning of every run on.
inline bool make_stripe(const kvc_shared_records& from, Stripe& stripe) {
    stripe = {from.data, from.block_stride, from.block_table, from.block_table_stride, from.block_size};
    return from.block_size > 0 && from.block_size % kRun == 0 && on_16_bytes(from.data, from.block_stride);
}

}  // namespace kvcompress::cuda
