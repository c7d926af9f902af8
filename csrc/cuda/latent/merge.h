// Merging the splits of a row of latents.
#pragma once

#include "cuda/latent/args.h"
#include "cuda/latent/numbers.h"

namespace kvcompress::cuda {

constexpr int kMergeThreads = 128;

// A block per row. Splits without tokens are the last ones, and have written no output.
template <bool BF16>
KVC_KERNEL_OF(kMergeThreads, 8)
latent_merge(KVC_ARGUMENT(LatentArgs) args) {
    const int request = block_y(), first_token = args.query_starts[request];
    const int64_t token = first_token + block_x() / args.num_heads;
    if (token >= args.query_starts[request + 1]) return;
    const int head = block_x() % args.num_heads;
    const int64_t row = token * args.num_heads + head;
    auto* weights = reinterpret_cast<float*>(shared_memory());  // [splits]
    auto* found =
        reinterpret_cast<float2*>(weights + (args.splits + 1) / 2 * 2);  // [warps]: largest level, splits with tokens

    float top = -INFINITY;
    int used = 0;
    for (int split = thread_index(); split < args.splits; split += kMergeThreads) {
        const float level = args.levels[split * args.rows + row];
        weights[split] = level;
        if (level != -INFINITY) used = split + 1;
        top = fmaxf(top, level);
    }
    KVC_UNROLL
    for (int lanes = 16; lanes; lanes /= 2) {
        top = fmaxf(top, shuffle_xor(top, lanes));
        const int others = shuffle_xor(used, lanes);
        if (others > used) used = others;
    }
    if (thread_index() % 32 == 0) found[thread_index() / 32] = {top, static_cast<float>(used)};
    sync_block();  // every warp's are known, and all levels
    for (int warp = 0; warp < kMergeThreads / 32; ++warp) {
        top = fmaxf(top, found[warp].x);
        const int others = static_cast<int>(found[warp].y);
        if (others > used) used = others;
    }

    const int rank = padded_rank(args.rank);
    uint16_t* to = args.output + token * args.output_token_stride + head * args.output_head_stride;
    for (int channel = 4 * thread_index(); channel < args.rank; channel += 4 * kMergeThreads) {
        float4 mixed = {0, 0, 0, 0};
        float sum = 0;
        for (int split = 0; split < used; ++split) {
            const float weight = exp2_of(weights[split] - top);
            const float4 x =
                *reinterpret_cast<const float4*>(args.partial + (split * args.rows + row) * rank + channel);
            mixed.x += weight * x.x, mixed.y += weight * x.y, mixed.z += weight * x.z, mixed.w += weight * x.w;
            sum += weight;
        }
        const float share_of_one = used ? 1 / sum : 0;
        const uint32_t pairs[2] = {pair_of<BF16>(mixed.x * share_of_one, mixed.y * share_of_one),
                                   pair_of<BF16>(mixed.z * share_of_one, mixed.w * share_of_one)};
        KVC_UNROLL
        for (int i = 0; i < 4; ++i)
            if (channel + i < args.rank) to[channel + i] = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
    }
}

}  // namespace kvcompress::cuda
