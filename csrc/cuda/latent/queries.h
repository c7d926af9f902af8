// Query rows as the first operand of the tensor core: in registers, or in shared memory where they are too long for that.
#pragma once

#include "cuda/latent/args.h"

namespace kvcompress::cuda {

// Steps of 16 channels that a warp of a narrow kernel has queries for.
constexpr int kLatentSteps = 9;

// Query rows 16 m + g and 16 m + g + 8 as the first operand, channels 16 step ...
template <int TILES>
KVC_DEVICE void load_queries(const LatentArgs& args, const LatentRows& rows, int part, int parts,
                             uint32_t (&query)[TILES][kLatentSteps][4]) {
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4, steps = args.token_bytes / 32;
    KVC_UNROLL
    for (int i = 0; i < 2 * TILES; ++i) {
        const int row = 8 * i + g;
        const bool used = row < rows.count;
        const uint16_t* from = args.query;
        if (used)
            from += rows.token(args, row) * args.query_token_stride + rows.head(args, row) * args.query_head_stride;
        KVC_UNROLL
        for (int n = 0; n < kLatentSteps; ++n) {
            const int step = part + n * parts;
            const auto* pair = reinterpret_cast<const uint32_t*>(from) + 8 * step + t;
            const bool there = used && step < steps;
            query[i / 2][n][i % 2] = there ? pair[0] : 0;
            query[i / 2][n][i % 2 + 2] = there ? pair[4] : 0;
        }
    }
}

// The same rows in shared memory.
template <int ROWS>
KVC_DEVICE void stage_queries(const LatentArgs& args, const LatentRows& rows, uint8_t* to) {
    const int words = args.token_bytes / 4;
    for (int row = thread_index() / 32; row < ROWS; row += kLatentWarps) {
        const bool used = row < rows.count;
        const uint16_t* from = args.query;
        if (used)
            from += rows.token(args, row) * args.query_token_stride + rows.head(args, row) * args.query_head_stride;
        auto* there = reinterpret_cast<uint32_t*>(to + row * (args.token_bytes + kTokenPadding));
        for (int i = thread_index() % 32; i < words; i += 32)
            there[i] = used ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
    }
}

}  // namespace kvcompress::cuda
