// The part of an output that is of tokens as they are: rows of the running step, a few per request.
#pragma once

#include "cuda/shared/mix.h"

namespace kvcompress::cuda {

struct ExactArgs {
    StepRows step;
    TokenRows query, keys, values;
    const float* scores;  // of keys of the layer's own, as `mix_shared` has them; null: scores are of `keys`
    int64_t score_stride;
    float* output;  // [tokens, heads, head_dim]
    float* lse;  // [tokens, heads]
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int first_request, max_queries, num_heads, group, head_dim;
    float softmax_scale;
};

constexpr int kMostChannels = 256;  // of a head

// A block per row, kMaxThreads tokens at a time.
KVC_KERNEL(kMaxThreads) attend_exact(KVC_ARGUMENT(ExactArgs) args) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int request = args.first_request + block_z(), kv_head = block_y();
    const int first_token = args.query_starts[request], queries = args.query_starts[request + 1] - first_token;
    const int query = block_x() / args.group, head = kv_head * args.group + block_x() % args.group;
    if (query >= queries) return;
    const int stored = args.step.stored_lens[request];
    const int32_t* rows = args.step.exact_rows + args.step.exact_starts[request];
    const int tokens = args.seq_lens[request] - queries + query + 1 - stored;
    const int64_t token = first_token + query;
    const int64_t score_row = (static_cast<int64_t>(block_z()) * args.max_queries + query) * args.num_heads + head;

    auto* weights = reinterpret_cast<float*>(shared_memory());  // [kMaxThreads]
    float top = kLowest, sum = 0, o[kMostChannels / kMaxThreads] = {};
    for (int start = 0; start < tokens; start += kMaxThreads) {
        const int count = tokens - start < kMaxThreads ? tokens - start : kMaxThreads;
        sync_block();  // nobody reads the last weights any more
        for (int i = warp; i < count; i += warps) {
            const int row = rows[start + i];
            float score = -INFINITY;
            if (row >= 0 && args.scores) {
                score = args.scores[score_row * args.score_stride + stored + start + i];
            } else if (row >= 0) {
                float product = 0;
                for (int d = lane; d < args.head_dim; d += 32)
                    product += load_entry(args.query, token, head, d) * load_entry(args.keys, row, kv_head, d);
                score = sum_lanes(product) * args.softmax_scale * kLog2E;
            }
            if (lane == 0) weights[i] = score;
        }
        sync_block();  // all scores are there
        float largest = top;
        for (int i = 0; i < count; ++i) largest = fmaxf(largest, weights[i]);
        const float decay = exp2_of(top - largest);
        top = largest, sum *= decay;
        KVC_UNROLL
        for (float& x : o) x *= decay;
        for (int i = 0; i < count; ++i) {
            const int row = rows[start + i];
            if (row < 0) continue;
            const float p = exp2_of(weights[i] - largest);
            sum += p;
            KVC_UNROLL
            for (int n = 0; n < kMostChannels / kMaxThreads; ++n) {
                const int d = thread_index() + n * kMaxThreads;
                if (d < args.head_dim) o[n] += p * load_entry(args.values, row, kv_head, d);
            }
        }
    }
    const int64_t number = token * args.num_heads + head;
    KVC_UNROLL
    for (int n = 0; n < kMostChannels / kMaxThreads; ++n) {
        const int d = thread_index() + n * kMaxThreads;
        if (d < args.head_dim) args.output[number * args.head_dim + d] = sum == 0 ? 0 : o[n] / sum;
    }
    if (thread_index() == 0) args.lse[number] = sum == 0 ? -INFINITY : (top + log2_of(sum)) * kLn2;
}

}  // namespace kvcompress::cuda
