// What the kernels for the form `blocks` know of a record, whose bytes are those of kvcompress/codec/blocks/spec.py: a
// block is one chunk of tokens. Nothing is moved for the tensor core's sake: instead, the order in which channels and
// tokens enter its products is the one in which a lane finds them.
//
// Tokens: row (or depth) x of eight stands for token token_of(x), so that lanes with different t read rows of a page
// that lie in different banks. Channels, 64 at a time, a column: for keys, lane t of four holds the sixteen channels
// 16 t ..., in the pairs that its words unpack to; for values, lane g of eight holds the channels 8 g ...
#pragma once

#include "kvcompress/blocks.h"

#include "cuda/core/merge.h"
#include "cuda/core/pipeline.h"
#include "cuda/core/softmax.h"

namespace kvcompress::cuda {

constexpr int kColumn = 64;  // channels
constexpr int kMaxColumns = KVC_BLOCKS_CUDA_MAX_RANK / kColumn;
constexpr int kMaxLowRank = KVC_BLOCKS_CUDA_MAX_LOW_RANK;  // even: factors are loaded in pairs

// Keys or values; offsets are within the side's own part of a record.
struct BlockSide {
    int rank, low_rank, outliers;
    int groups;  // of a token's channels that share a scale; for keys 1: all tokens do
    uint32_t reciprocal;  // 2^32 / rank, rounded up
    int bytes;
    int scale_offset, zero_offset, token_offset, channel_offset, value_offset, place_offset;
};

struct BlockArgs {
    AttendArgs attend;  // of pages: data, strides, page_shift, number of heads, and ranks
    BlockSide k, v;
    int64_t record_bytes;
    int stage_bytes;  // of the larger part
    // Offsets in shared memory.
    int code_query_at, scratch_at;
    int scratch_bytes;  // of a warp
};

KVC_BOTH int columns_of(int rank) { return (rank + kColumn - 1) / kColumn; }

KVC_BOTH int token_of(int x) { return x / 2 + 4 * (x % 2); }
constexpr int kApart = token_of(1) - token_of(0);  // rows of a page between the tokens of a pair
KVC_BOTH int row_of(int token) { return 2 * (token % 4) + token / 4; }

// Channels of the two entries of a pair, among the sixteen that a lane holds of a token's keys.
template <int BITS>
KVC_BOTH int code_channel(int pair, int e) {
    constexpr int kApart = 16 / BITS;
    return 2 * kApart * (pair / kApart) + pair % kApart + kApart * e;
}

KVC_DEVICE const uint8_t* record_at(const BlockArgs& args, int64_t page, int within, int head) {
    const Pages& pages = args.attend.pages;
    return pages.data + page * pages.block_stride + head * pages.head_stride + within * args.record_bytes;
}

KVC_DEVICE uint32_t two_halves(const uint16_t* first, int apart) {
    return first[0] | static_cast<uint32_t>(first[apart]) << 16;
}

}  // namespace kvcompress::cuda
