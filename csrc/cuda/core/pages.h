// What a kernel knows of a layer's pages: one chunk's bytes, the channels of each side as tiles of a tensor core.
#pragma once

#include "kvcompress/heads.h"

#include "cuda/core/codes.h"

namespace kvcompress::cuda {

constexpr int kRows = 8;  // query rows of a tile: columns of the tensor core's second operand

// Of 256 and of 128 channels, in bands with an odd number of units.
constexpr int kMaxTiles = KVC_HEADS_CUDA_MAX_TILES, kUsualTiles = 9;

// Offsets are within a chunk; of parts that are absent, -1.
struct Side {
    int rank, num_tiles, outliers;
    int gain_offset, outlier_offset, channel_offset;
    Tile tiles[kMaxTiles];
};

struct Pages {
    uint8_t* data;
    int64_t block_stride, head_stride;
    int chunk_bytes;
    int page_shift;  // a page is 1 << page_shift chunks
    int num_heads;
    Side k, v;
};

KVC_DEVICE uint8_t* chunk_at(const Pages& pages, int64_t block, int within, int head) {
    return pages.data + block * pages.block_stride + head * pages.head_stride +
           static_cast<int64_t>(within) * pages.chunk_bytes;
}

}  // namespace kvcompress::cuda
