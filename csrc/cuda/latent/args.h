// What the kernels for MLA latents are told, and which rows a block of threads has.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

constexpr int kLatentThreads = 256, kLatentWarps = kLatentThreads / 32;
constexpr int kSliceChannels = 512;  // of an output that one block computes
constexpr int kTokenPadding = 16;  // bytes between tokens in shared memory: eight of them then begin in different banks
constexpr int kMostTilesAhead = 3;
constexpr int kLeastTiles = 4;  // of a split: below, merging costs more than it brings

// Strides in bytes for what is copied, in entries otherwise.
struct LatentArgs {
    const uint8_t* pages;
    int64_t block_stride, token_stride;
    int block_size, token_bytes;
    const uint16_t* query;
    int64_t query_token_stride, query_head_stride;
    uint16_t* output;
    int64_t output_token_stride, output_head_stride;
    float* partial;  // [splits, tokens, heads, padded rank] for several splits
    float* levels;  // [splits, tokens, heads]: log2 of a split's sum of exponentials
    const int32_t* table;
    int64_t table_stride;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int64_t rows;  // tokens * heads
    int num_heads, rank, splits, slices;
    int stages;
    float factor;  // softmax scale / ln 2
    // Offsets in shared memory.
    int state_at, weight_at, score_at, query_at, tile_at;
};

KVC_BOTH int padded_rank(int rank) { return (rank + 15) / 16 * 16; }

// A request's rows are its tokens' heads, one after the other: all heads see the same latents.
struct LatentRows {
    int first_token, queries, length;  // of the request
    int first, count;  // of its rows

    template <int ROWS>
    KVC_DEVICE static LatentRows of(const LatentArgs& args, int request, int tile) {
        LatentRows rows;
        rows.first_token = args.query_starts[request];
        rows.queries = args.query_starts[request + 1] - rows.first_token;
        rows.length = args.seq_lens[request];
        rows.first = tile * ROWS;
        rows.count = rows.queries * args.num_heads - rows.first;
        if (rows.count > ROWS) rows.count = ROWS;
        return rows;
    }
    KVC_DEVICE int visible(const LatentArgs& args, int row) const {
        return length - queries + (first + row) / args.num_heads + 1;
    }
    KVC_DEVICE int64_t token(const LatentArgs& args, int row) const {
        return first_token + (first + row) / args.num_heads;
    }
    KVC_DEVICE int head(const LatentArgs& args, int row) const { return (first + row) % args.num_heads; }
};

}  // namespace kvcompress::cuda
