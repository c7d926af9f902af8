// The query rows of a block that scores tokens for another kernel: what it needs of them in shared memory, and where
// their scores go. Scores are in the exponent of 2.
#pragma once

#include "cuda/core/rows.h"
#include "cuda/shared/records.h"

namespace kvcompress::cuda {

constexpr int kMostRowTiles = 16;  // of eight rows

// Of some requests at a time. Scores are [requests, max_queries, num_heads, score_stride].
struct ScoreArgs {
    Record record;
    Stripe stripes[kMaxStripes];
    TokenRows query;
    float* scores;
    int64_t score_stride;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int first_request, max_queries, num_heads, group, row_groups, row_tiles, num_stripes;
    float softmax_scale;
    int query_at, factor_at, target_at;  // offsets in shared memory
};

// Rows of a request, query token by query token, are query heads of one KV head.
struct ScoreRows {
    int request, first_token, queries, first, count, head;
    int limit;  // tokens that the last row sees

    KVC_DEVICE bool find(const ScoreArgs& args) {
        request = args.first_request + block_z();
        head = block_y() / args.row_groups;
        first_token = args.query_starts[request];
        queries = args.query_starts[request + 1] - first_token;
        first = block_y() % args.row_groups * kRows * args.row_tiles;
        count = queries * args.group - first;
        if (count > kRows * args.row_tiles) count = kRows * args.row_tiles;
        if (count > 0) limit = args.seq_lens[request] - queries + token_of(args, count - 1) + 1;
        return count > 0 && limit > 0;
    }
    KVC_DEVICE int token_of(const ScoreArgs& args, int row) const { return (first + row) / args.group; }
    KVC_DEVICE int head_of(const ScoreArgs& args, int row) const {
        return head * args.group + (first + row) % args.group;
    }
    KVC_DEVICE float* scores(const ScoreArgs& args, int row) const {
        const int64_t token = static_cast<int64_t>(block_z()) * args.max_queries + token_of(args, row);
        return args.scores + (token * args.num_heads + head_of(args, row)) * args.score_stride;
    }
};

// Rows as halves in the order of the second operand, tile by tile of 16 channels, the factor that undoes their scale, and
// where their scores go. entry(row, channel) is a query's, depth(channel) its depth in the tile.
template <typename Entry, typename Depth>
KVC_DEVICE void prepare_queries(const ScoreArgs& args, const ScoreRows& rows, int channels, uint8_t* shared,
                                const Entry& entry, const Depth& depth) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    auto* halves = reinterpret_cast<uint16_t*>(shared + args.query_at);
    auto* factor = reinterpret_cast<float*>(shared + args.factor_at);
    auto* target = reinterpret_cast<float**>(shared + args.target_at);
    for (int row = warp; row < kRows * args.row_tiles; row += warps) {
        const bool used = row < rows.count;
        float largest = 0;
        for (int c = lane; c < channels; c += 32) largest = fmaxf(largest, used ? fabsf(entry(row, c)) : 0);
        largest = largest_lane(largest);
        const int up = up_to_top(largest);
        for (int c = lane; c < channels; c += 32) {
            const int n = depth(c % kTileChannels), tile = row / kRows * (channels / kTileChannels) + c / kTileChannels;
            const int place = ((tile * 32 + 4 * (row % kRows) + n % 8 / 2) * 2 + n / 8) * 2 + n % 2;
            halves[place] = float_to_half(used ? entry(row, c) * power_of_two(up) : 0);
        }
        if (lane == 0) {
            factor[row] = args.softmax_scale * kLog2E * power_of_two(-up);
            target[row] = used ? rows.scores(args, row) : nullptr;
        }
    }
}

// Scores of tokens first + g and first + g + 8 and of rows 2 t and 2 t + 1 of a tile, each times its token's factor.
KVC_DEVICE void write_scores(const ScoreArgs& args, const ScoreRows& rows, int row_tile, int first, float unit0,
                             float unit1, const float (&s)[4], const uint8_t* shared) {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
    const auto* factor = reinterpret_cast<const float*>(shared + args.factor_at);
    const auto* target = reinterpret_cast<float* const*>(shared + args.target_at);
    KVC_UNROLL
    for (int e = 0; e < 2; ++e) {
        const int row = kRows * row_tile + 2 * t + e;
        if (!target[row]) continue;
        float* scores = target[row] + first + g;
        if (first + g < rows.limit) scores[0] = s[e] * unit0 * factor[row];
        if (first + g + 8 < rows.limit) scores[8] = s[2 + e] * unit1 * factor[row];
    }
}

}  // namespace kvcompress::cuda
