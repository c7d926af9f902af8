// The query rows of a block of threads, and what its warps need of them in shared memory.
#pragma once

#include "cuda/core/pages.h"

namespace kvcompress::cuda {

constexpr int kMaxThreads = 128;
constexpr float kLowest = -1e30f;  // below every score; unlike infinity it can be subtracted from itself
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

struct AttendArgs {
    Pages pages;
    const float* query;  // [tokens, heads, k.rank]
    float* output;       // [splits, tokens, heads, v.rank]
    float* lse;          // [splits, tokens, heads]
    const int32_t* table;
    int64_t table_stride;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int num_heads, group, row_tiles;
    int64_t rows;  // tokens * heads
    float softmax_scale;
    // Offsets in shared memory.
    int query_at, start_at, factor_at, exact_query_at, exact_sum_at, stages_at;
};

// Which rows they are.
struct Rows {
    int first_token, queries, length;  // of the request
    int first, count;                  // of its rows (query token, head of the group)
    int head;                          // KV head

    KVC_DEVICE int token_of(const AttendArgs& args, int row) const { return (first + row) / args.group; }
    KVC_DEVICE int visible(const AttendArgs& args, int row) const { return length - queries + token_of(args, row) + 1; }
    // Number among all tokens' and heads' rows.
    KVC_DEVICE int64_t number(const AttendArgs& args, int row) const {
        const int64_t token = first_token + token_of(args, row);
        return token * args.num_heads + head * args.group + (first + row) % args.group;
    }
};

// The rows of this block of threads; false if there are none.
KVC_DEVICE bool find_rows(const AttendArgs& args, Rows& rows) {
    const int request = block_z();
    rows.head = block_y() / args.row_tiles;
    rows.first_token = args.query_starts[request];
    rows.queries = args.query_starts[request + 1] - rows.first_token;
    rows.length = args.seq_lens[request];
    rows.first = block_y() % args.row_tiles * kRows;
    rows.count = rows.queries * args.group - rows.first;
    if (rows.count > kRows) rows.count = kRows;
    return rows.count > 0;
}

// Rows as halves in the order of the second operand, accumulators' beginnings, factors, and float32 rows for outliers.
template <bool OUTLIERS>
KVC_DEVICE void prepare_rows(const AttendArgs& args, const Rows& rows, uint8_t* shared) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const Side& side = args.pages.k;
    auto* halves = reinterpret_cast<uint16_t*>(shared + args.query_at);
    auto* start = reinterpret_cast<float*>(shared + args.start_at);
    auto* factor = reinterpret_cast<float*>(shared + args.factor_at);
    for (int row = warp; row < kRows; row += warps) {
        const bool used = row < rows.count;
        const float* query = args.query + (used ? rows.number(args, row) * side.rank : 0);
        float largest = 0;
        for (int tile = 0; tile < side.num_tiles; ++tile) {
            const Tile& it = side.tiles[tile];
            if (used && lane < kGroup * it.units) largest = fmaxf(largest, fabsf(query[it.channel + lane] * it.step));
        }
        KVC_UNROLL
        for (int lanes = 16; lanes; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
        const int up = up_to_top(largest);
        const float scale = power_of_two(up);
        float sums[3] = {0, 0, 0};  // of tiles in 8, 4 and 2 bits
        for (int tile = 0; tile < side.num_tiles; ++tile) {
            const Tile& it = side.tiles[tile];
            const bool there = used && lane < kGroup * it.units;
            const float x = there ? query[it.channel + lane] * scale : 0;
            if (OUTLIERS && side.outliers && there)
                reinterpret_cast<float*>(shared + args.exact_query_at)[kRows * (it.channel + lane) + row] = x;
            if (lane >= 16) continue;
            const uint16_t half = float_to_half(x * it.step);
            const int within = lane % kGroup;
            halves[((tile * 32 + 4 * row + within / 2) * 2 + lane / kGroup) * 2 + within % 2] = half;
            const float rounded = half_to_float(half);
            if (it.bits == 8) sums[0] += rounded;
            if (it.bits == 4) sums[1] += rounded;
            if (it.bits == 2) sums[2] += rounded;
        }
        KVC_UNROLL
        for (int lanes = 16; lanes; lanes /= 2)
            for (float& sum : sums) sum += shuffle_xor(sum, lanes);
        if (lane < kPairs)
            start[kRows * lane + row] = -((pair_offset<8>(lane) + middle(8)) * sums[0] + (pair_offset<4>(lane) + middle(4)) * sums[1] +
                                          (pair_offset<2>(lane) + middle(2)) * sums[2]);
        if (lane == 0) factor[row] = args.softmax_scale * kLog2E * power_of_two(-up);
    }
}

}  // namespace kvcompress::cuda
