// Merging the warps of a block.
#pragma once

#include "cuda/core/rows.h"

namespace kvcompress::cuda {

// `sums` has every warp's [rows][rank], then every warp's [rows] of largest score and sum of exponentials; `exact`, if
// there are outliers, every warp's [rank][rows].
KVC_DEVICE void merge_warps(const AttendArgs& args, const Rows& rows, const float* sums, const float* exact,
                            float* output, float* lse) {
    const int warps = num_threads() / 32, rank = args.pages.v.rank;
    const float* tops = sums + warps * kRows * rank;
    const auto* factors = reinterpret_cast<const float*>(shared_memory() + args.factor_at);
    for (int i = thread_index(); i < rows.count * rank; i += num_threads()) {
        const int row = i / rank, channel = i % rank;
        float top = kLowest, sum = 0, mixed = 0;
        for (int w = 0; w < warps; ++w) top = fmaxf(top, tops[2 * (w * kRows + row)]);
        for (int w = 0; w < warps; ++w) {
            const float* theirs = tops + 2 * (w * kRows + row);
            const float weight = exp2_of((theirs[0] - top) * factors[row]);
            float x = sums[(w * kRows + row) * rank + channel];
            if (exact) x += exact[(w * rank + channel) * kRows + row];
            sum += weight * theirs[1], mixed += weight * x;
        }
        const int64_t number = rows.number(args, row);
        output[number * rank + channel] = sum == 0 ? 0 : mixed / sum;
        if (channel == 0) lse[number] = sum == 0 ? -INFINITY : (top * factors[row] + log2_of(sum)) * kLn2;
    }
}

// A split without tokens. Alone, it is a request without tokens.
KVC_DEVICE void write_nothing(const AttendArgs& args, const Rows& rows, float* output, float* lse) {
    const int rank = args.pages.v.rank;
    if (thread_index() < rows.count) lse[rows.number(args, thread_index())] = -INFINITY;
    if (grid_x() > 1) return;
    for (int i = thread_index(); i < rows.count * rank; i += num_threads())
        output[rows.number(args, i / rank) * rank + i % rank] = 0;
}

}  // namespace kvcompress::cuda
