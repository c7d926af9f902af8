// What kernels need to know of records, from what the C interface is told.
#pragma once

#include "kvcompress/cuda_shared.h"

#include "cuda/shared/records.h"

namespace kvcompress::cuda {

inline bool make_record(const kvc_records& from, Record& record) {
    record = {};
    const kvc_side& side = from.side;
    if (side.num_bands < 1 || side.num_bands > KVC_MAX_BANDS || side.outliers || from.token_bytes % 2) return false;
    record.rank = side.rank, record.token_bytes = from.token_bytes, record.gain_offset = static_cast<int>(side.gain_offset);
    int offset = static_cast<int>(side.code_offset), channel = 0;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], width = side.widths[band];
        if ((bits != 16 && bits != 8 && bits != 4 && bits != 2) || width <= 0 || width % kGroup) return false;
        if ((bits == 16) != (side.gain_offset < 0) || (bits == 16 && (side.num_bands > 1 || offset % 16 || from.token_bytes % 16))) return false;
        if (bits > record.widest) record.widest = bits;
        for (int left = width / kGroup; left > 0; left -= 2) {
            const int units = left > 1 ? 2 : 1;
            if (record.num_tiles == kMaxRecordTiles) return false;
            record.tiles[record.num_tiles++] = {offset, channel, units, bits, side.steps[band]};
            offset += units * bits, channel += units * kGroup;
        }
    }
    return channel == side.rank && offset <= from.token_bytes;
}

// Copies are of 16 bytes, from the beginning of every run on.
inline bool make_stripe(const kvc_records& from, Stripe& stripe) {
    stripe = {from.data, from.block_stride, from.block_table, from.block_table_stride, from.block_size};
    return from.block_size > 0 && from.block_size % kRun == 0 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0 && from.block_stride % 16 == 0;
}

}  // namespace kvcompress::cuda
