// Storing tokens of latents as they are.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

constexpr int kAppendThreads = 128;

struct LatentAppendArgs {
    uint8_t* pages;
    const uint8_t* keys;
    int64_t block_stride, token_stride, key_stride;  // bytes
    const int64_t* slots;
    int64_t num_slots;
    int block_size, token_bytes;
};

// A block per token.
template <typename Word>
KVC_KERNEL_OF(kAppendThreads, 8)
latent_append(KVC_ARGUMENT(LatentAppendArgs) args) {
    const int64_t slot = args.slots[block_x()];
    if (slot < 0 || slot >= args.num_slots) return;
    const auto* from = reinterpret_cast<const Word*>(args.keys + block_x() * args.key_stride);
    auto* to = reinterpret_cast<Word*>(args.pages + slot / args.block_size * args.block_stride +
                                       slot % args.block_size * args.token_stride);
    const int words = args.token_bytes / static_cast<int>(sizeof(Word));
    for (int i = thread_index(); i < words; i += kAppendThreads) to[i] = from[i];
}

}  // namespace kvcompress::cuda
