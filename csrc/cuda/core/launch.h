// From what the C interface is told to launches: rows, sides as tiles, pages, and what fits in shared memory.
#pragma once

#include "cuda/core/arena.h"
#include "cuda/core/rows.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {

struct LaunchShape {
    Grid grid;
    int threads;
    int64_t shared_bytes;
    void* stream;
};

inline TokenRows token_rows(const kvc_rows& rows) {
    return {rows.data, rows.token_stride, rows.head_stride, rows.dtype};
}

// Copies are of 16 bytes; strides in bytes.
inline bool on_16_bytes(const void* data, int64_t first_stride = 0, int64_t second_stride = 0) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(first_stride) |
            static_cast<uint64_t>(second_stride)) %
               16 ==
           0;
}

// Bands as tiles; codes of eight channels of `tokens` tokens lie together.
inline bool make_tiles(const kvc_side& from, int tokens, int most, Tile* tiles, int& num_tiles) {
    if (from.num_bands < 1 || from.num_bands > KVC_MAX_BANDS) return false;
    int offset = static_cast<int>(from.code_offset), channel = 0;
    for (int band = 0; band < from.num_bands; ++band) {
        const int bits = from.bits[band], width = from.widths[band];
        if (!is_width(bits) || width <= 0 || width % kGroup) return false;
        if ((bits == 16) != (from.gain_offset < 0) || (bits == 16 && from.num_bands > 1)) return false;
        for (int left = width / kGroup; left > 0; left -= 2) {
            const int units = left > 1 ? 2 : 1;
            if (num_tiles == most) return false;
            tiles[num_tiles++] = {offset, channel, units, bits, from.steps[band]};
            offset += units * tokens * bits, channel += units * kGroup;
        }
    }
    return channel == from.rank;
}

// Pages of a power of two of chunks.
template <typename From>
bool make_places(const From& from, Pages& pages) {
    pages.data = from.data;
    pages.block_stride = from.block_stride, pages.head_stride = from.head_stride;
    pages.num_heads = from.num_kv_heads;
    while (kChunk << pages.page_shift < from.block_size) ++pages.page_shift;
    return kChunk << pages.page_shift == from.block_size && from.num_kv_heads > 0 &&
           on_16_bytes(from.data, from.block_stride, from.head_stride);
}

// As many warps as there is room for by lay_out(warps), the bytes that they take; 0 for none.
template <typename LayOut>
int warps_for(int64_t limit, const LayOut& lay_out) {
    int warps = kMaxThreads / 32;
    while (warps && lay_out(warps) > limit) warps /= 2;
    return warps;
}

}  // namespace kvcompress::cuda
