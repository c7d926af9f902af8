// The query rows of a block of threads.
#pragma once

#include "cuda/core/pages.h"

namespace kvcompress::cuda {

constexpr int kMaxThreads = 128;
constexpr float kLowest = -1e30f;  // below every score; unlike infinity it can be subtracted from itself
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

struct AttendArgs {
    Pages pages;
    const float* query;  // [tokens, heads, k.rank]
    float* output;  // [splits, tokens, heads, v.rank]
    float* lse;  // [splits, tokens, heads]
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
    int first, count;  // of its rows (query token, head of the group)
    int head;  // KV head

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

}  // namespace kvcompress::cuda
