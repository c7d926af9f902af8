// Launches of the kernels that encode and decode tokens (encode.cu), and what they are told.
#pragma once

#include "cuda/core/pages.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {

constexpr int kMaxRank = KVC_HEADS_CUDA_MAX_RANK,
              kUsualRank = 128;  // kernels of their own: channels of a token take registers

struct EncodeSide {
    TokenRows rows;
    const float *mean, *encode, *weight;  // [heads, head_dim], [heads, head_dim, rank], [heads, rank]
};

struct EncodeArgs {
    Pages pages;
    EncodeSide k, v;
    const int64_t* slots;  // of single tokens; below 0: none
    const int64_t* blocks;  // of whole blocks of tokens, in their order
    int64_t num_tokens;
    int64_t num_slots;  // of the cache
    int head_dim;
};

struct GatherArgs {
    Pages pages;
    void *keys, *values;  // [tokens, heads, rank], contiguous
    int dtype;
    const int32_t* table;  // of one request
    int num_tokens;
};

// Tokens into their slots.
int start_append(const EncodeArgs& args, void* stream);

// Whole blocks of tokens.
int start_compress(const EncodeArgs& args, void* stream);

int start_gather(const GatherArgs& args, void* stream);

}  // namespace kvcompress::cuda
