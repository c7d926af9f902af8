// Merging the splits of a row.
#pragma once

#include "cuda/core/rows.h"

namespace kvcompress::cuda {

struct CombineArgs {
    const float* partial_output;  // [splits, tokens, heads, rank]
    const float* partial_lse;  // [splits, tokens, heads]
    float* output;
    float* lse;
    const int32_t* query_starts;
    int splits, rank, num_heads, group;
    int64_t rows;
};

// Merge splits: a block per row of a request.
KVC_KERNEL(kMaxThreads) combine(KVC_ARGUMENT(CombineArgs) args) {
    const int request = block_z(), first_token = args.query_starts[request];
    const int token = block_x() / args.group;
    if (token >= args.query_starts[request + 1] - first_token) return;
    const int64_t row =
        static_cast<int64_t>(first_token + token) * args.num_heads + block_y() * args.group + block_x() % args.group;
    float top = -INFINITY, sum = 0;
    for (int split = 0; split < args.splits; ++split) top = fmaxf(top, args.partial_lse[split * args.rows + row]);
    for (int split = 0; split < args.splits; ++split) {
        const float lse = args.partial_lse[split * args.rows + row];
        if (lse != -INFINITY) sum += exp2_of((lse - top) * kLog2E);
    }
    for (int channel = thread_index(); channel < args.rank; channel += num_threads()) {
        float mixed = 0;
        for (int split = 0; split < args.splits; ++split) {
            const float lse = args.partial_lse[split * args.rows + row];
            // A split without tokens has written no output.
            if (lse != -INFINITY)
                mixed += exp2_of((lse - top) * kLog2E) *
                         args.partial_output[(split * args.rows + row) * args.rank + channel];
        }
        args.output[row * args.rank + channel] = sum == 0 ? 0 : mixed / sum;
    }
    if (thread_index() == 0) args.lse[row] = sum == 0 ? -INFINITY : top + log2_of(sum) * kLn2;
}

}  // namespace kvcompress::cuda
