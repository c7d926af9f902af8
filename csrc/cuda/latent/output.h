// What a block writes: an output, or a split's share of it and the share's weight.
#pragma once

#include "cuda/latent/args.h"
#include "cuda/latent/numbers.h"

namespace kvcompress::cuda {

// A split without tokens. Alone, it is a request without tokens.
template <int ROWS>
KVC_DEVICE void write_no_latents(const LatentArgs& args, const LatentRows& rows, int slice) {
    const int thread = thread_index();
    if (args.splits > 1) {
        if (slice == 0 && thread < rows.count)
            args.levels[block_y() * args.rows + rows.token(args, thread) * args.num_heads + rows.head(args, thread)] =
                -INFINITY;
        return;
    }
    for (int row = thread / 32; row < rows.count; row += kLatentWarps) {
        uint16_t* to = args.output + rows.token(args, row) * args.output_token_stride +
                       rows.head(args, row) * args.output_head_stride;
        for (int i = kSliceChannels * slice + thread % 32; i < args.rank && i < kSliceChannels * (slice + 1); i += 32)
            to[i] = 0;
    }
}

// Sums of rows 16 m + g and + 8: output channels 2 t and the next of each eight, the eights being as the kernel's warps
// have them. `state` has every row's largest score and sum of weights.
template <bool BF16, int TILES, int UNITS>
KVC_DEVICE void write_latents(const LatentArgs& args, const LatentRows& rows, int slice, const float2* state,
                              const float (&o)[TILES][2 * UNITS][4]) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
    KVC_UNROLL
    for (int i = 0; i < 2 * TILES; ++i) {
        const int row = 8 * i + g;
        if (row >= rows.count) continue;
        const float2 level = state[row];
        const float share_of_one = level.y == 0 ? 0 : 1 / level.y;
        const int64_t token = rows.token(args, row);
        const int head = rows.head(args, row);
        const int64_t number = block_y() * args.rows + token * args.num_heads + head;
        if (args.splits > 1 && slice == 0 && warp == 0 && t == 0) args.levels[number] = level.x + log2_of(level.y);
        KVC_UNROLL
        for (int n = 0; n < 2 * UNITS; ++n) {
            const int channel = kSliceChannels * slice + 16 * (kLatentWarps * (n / 2) + warp) + 8 * (n % 2) + 2 * t;
            const float low = o[i / 2][n][2 * (i % 2)] * share_of_one,
                        high = o[i / 2][n][2 * (i % 2) + 1] * share_of_one;
            if (args.splits > 1) {
                if (channel < padded_rank(args.rank))
                    *reinterpret_cast<float2*>(args.partial + number * padded_rank(args.rank) + channel) = {low, high};
            } else {
                uint16_t* to =
                    args.output + token * args.output_token_stride + head * args.output_head_stride + channel;
                const uint32_t pair = pair_of<BF16>(low, high);
                if (channel < args.rank) to[0] = static_cast<uint16_t>(pair);
                if (channel + 1 < args.rank) to[1] = static_cast<uint16_t>(pair >> 16);
            }
        }
    }
}

}  // namespace kvcompress::cuda
