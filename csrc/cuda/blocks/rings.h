// The newest tokens, as they are: attention on those of a query's incomplete block, merged with what its complete blocks
// gave, and putting tokens into the rings for the steps after this one. A query sees fewer exact tokens than a block has.
#pragma once

#include "cuda/core/gain.h"
#include "cuda/core/rows.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {

constexpr int kMaxExact = kChunk + kRows;  // tokens that eight rows together see exactly, at most
constexpr int kExactHeadDim = KVC_BLOCKS_CUDA_MAX_HEAD_DIM;

struct Rings {
    const void* data;
    int64_t ring_stride, head_stride;  // in entries
    int places, dtype;
};

struct NewestArgs {
    AttendArgs attend;  // query, output and lse are those of complete blocks: [tokens, heads], of the output expanded
    Rings rings;
    const int32_t* ring_of;
    TokenRows query, keys, values;
    void* output;
    int64_t output_token_stride, output_head_stride;
    int output_dtype;
    float* lse;  // may be null
    const float *k_mean, *v_mean;  // [KV heads, head_dim]
    int head_dim;
};

struct KeepArgs {
    Rings rings;
    const int32_t *ring_of, *query_starts, *seq_lens;
    TokenRows keys, values;
    int num_requests, head_dim;
};

KVC_DEVICE int entry_bytes(int dtype) { return dtype == KVC_FLOAT32 ? 4 : 2; }

// Eight neighbouring numbers as float32.
KVC_DEVICE void load_eight(const void* rows, int64_t at, int dtype, float (&x)[8]) {
    const auto* first = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(rows) + at * entry_bytes(dtype));
    const uint4 w = first[0];
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
    union {
        uint32_t bits;
        float number;
    } wide;
    if (dtype == KVC_FLOAT32) {
        const uint4 v = first[1];
        const uint32_t all[8] = {w.x, w.y, w.z, w.w, v.x, v.y, v.z, v.w};
        KVC_UNROLL
        for (int i = 0; i < 8; ++i) wide.bits = all[i], x[i] = wide.number;
        return;
    }
    KVC_UNROLL
    for (int i = 0; i < 8; ++i) {
        const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
        wide.bits = static_cast<uint32_t>(half) << 16;
        x[i] = dtype == KVC_FLOAT16 ? half_to_float(half) : wide.number;
    }
}

// Where numbers of one token and head begin.
struct ExactRow {
    const void* data;
    int64_t at;  // in entries
    int dtype;
};

// A request's token: in its ring, or among the step's own.
KVC_DEVICE ExactRow exact_row(const NewestArgs& args, const Rows& rows, int ring, int position, bool keys) {
    const int own = position - (rows.length - rows.queries);
    if (own < 0) {
        const Rings& rings = args.rings;
        const int place = position % rings.places + (keys ? 0 : rings.places);
        return {rings.data,
                ring * rings.ring_stride + rows.head * rings.head_stride + static_cast<int64_t>(place) * args.head_dim,
                rings.dtype};
    }
    const TokenRows& step = keys ? args.keys : args.values;
    return {step.data, (rows.first_token + own) * step.token_stride + rows.head * step.head_stride, step.dtype};
}

// A block takes eight rows, as in decode.h. Shared memory: keys and values of the tokens, queries, weights, and what the
// rows' complete blocks count.
KVC_KERNEL(kMaxThreads) attend_newest(KVC_ARGUMENT(NewestArgs) args) {
    const AttendArgs& attend = args.attend;
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32,
              head_dim = args.head_dim;
    Rows rows{};
    if (!find_rows(attend, rows)) return;
    const int first = rows.visible(attend, 0) / kChunk * kChunk, count = rows.visible(attend, rows.count - 1) - first;
    const int ring = args.ring_of[block_z()],
              width = head_dim + 4;  // threads with different tokens use different banks
    auto* keys = reinterpret_cast<float*>(shared_memory());  // [kMaxExact][width]
    float* values = keys + kMaxExact * width;
    float* queries = values + kMaxExact * width;  // [kRows][head_dim]
    float* weights = queries + kRows * head_dim;  // [kMaxExact][kRows]
    float* sealed = weights + kMaxExact * kRows;  // [kRows]

    for (int i = thread_index(); i < 2 * count * (head_dim / 8); i += num_threads()) {
        const int d = i % (head_dim / 8) * 8, token = i / (head_dim / 8) % count, side = i / (head_dim / 8) / count;
        const ExactRow from = exact_row(args, rows, ring, first + token, side == 0);
        float x[8];
        load_eight(from.data, from.at + d, from.dtype, x);
        float* to = (side == 0 ? keys : values) + token * width + d;
        KVC_UNROLL
        for (int n = 0; n < 8; ++n) to[n] = x[n];
    }
    for (int i = thread_index(); i < rows.count * head_dim; i += num_threads()) {
        const int row = i / head_dim, d = i % head_dim;
        const int64_t number = rows.number(attend, row);
        const float x =
            load_entry(args.query, number / attend.num_heads, static_cast<int>(number % attend.num_heads), d);
        queries[row * head_dim + d] = x * attend.softmax_scale * kLog2E;
    }
    sync_block();  // all is loaded

    for (int i = thread_index(); i < count * rows.count; i += num_threads()) {
        const int token = i % count, row = i / count, seen = rows.visible(attend, row);
        float score = -INFINITY;
        if (first + token < seen && first + token >= seen / kChunk * kChunk) {
            score = 0;
            for (int d = 0; d < head_dim; ++d) score += queries[row * head_dim + d] * keys[token * width + d];
        }
        weights[token * kRows + row] = score;
    }
    sync_block();  // all scores are there

    for (int row = warp; row < rows.count; row += warps) {
        const int64_t number = rows.number(attend, row);
        float mean = 0;
        for (int d = lane; d < head_dim; d += 32)
            mean += queries[row * head_dim + d] * args.k_mean[rows.head * head_dim + d];
        mean = sum_lanes(mean);
        // A row without complete blocks has minus infinity here, and a query that is not finite NaN.
        const float blocks = attend.lse[number] * kLog2E + mean;
        float top = fmaxf(blocks, kLowest);
        for (int token = lane; token < count; token += 32) top = fmaxf(top, weights[token * kRows + row]);
        top = largest_lane(top);
        float sum = 0;
        for (int token = lane; token < count; token += 32) sum += exp2_of(weights[token * kRows + row] - top);
        sum = sum_lanes(sum) + exp2_of(blocks - top);
        for (int token = lane; token < count; token += 32)
            weights[token * kRows + row] = exp2_of(weights[token * kRows + row] - top) / sum;
        if (lane == 0) sealed[row] = exp2_of(blocks - top) / sum;
        if (lane == 0 && args.lse) args.lse[number] = (top + log2_of(sum)) * kLn2;
    }
    sync_block();  // all weights are there

    for (int i = thread_index(); i < rows.count * head_dim; i += num_threads()) {
        const int row = i / head_dim, d = i % head_dim;
        const int64_t number = rows.number(attend, row), token = number / attend.num_heads,
                      head = number % attend.num_heads;
        float x = sealed[row] * (attend.output[number * head_dim + d] + args.v_mean[rows.head * head_dim + d]);
        for (int n = 0; n < count; ++n) x += weights[n * kRows + row] * values[n * width + d];
        store_entry(args.output, args.output_dtype,
                    token * args.output_token_stride + head * args.output_head_stride + d, x);
    }
}

// The step's tokens into the rings: those that no later one of their request takes the place of. A block per token and
// head; a copy of as many bytes as an entry has.
KVC_KERNEL(kEncodeThreads) keep(KVC_ARGUMENT(KeepArgs) args) {
    const int token = block_x(), head = block_y();
    // The last request that begins at or before the token.
    int request = 0, last = args.num_requests;
    if (token >= args.query_starts[last]) return;  // padding
    while (last - request > 1) {
        const int middle = (request + last) / 2;
        if (args.query_starts[middle] <= token)
            request = middle;
        else
            last = middle;
    }
    const Rings& rings = args.rings;
    const int left = args.query_starts[request + 1] - token, position = args.seq_lens[request] - left;
    if (left > rings.places) return;
    const int64_t at = args.ring_of[request] * rings.ring_stride + head * rings.head_stride +
                       static_cast<int64_t>(position % rings.places) * args.head_dim;
    const int64_t side = static_cast<int64_t>(rings.places) * args.head_dim;
    auto* data = const_cast<void*>(rings.data);
    for (int i = thread_index(); i < 2 * args.head_dim; i += num_threads()) {
        const int d = i % args.head_dim;
        const TokenRows& rows = i < args.head_dim ? args.keys : args.values;
        store_entry(data, rings.dtype, at + (i < args.head_dim ? 0 : side) + d, load_entry(rows, token, head, d));
    }
}

}  // namespace kvcompress::cuda
