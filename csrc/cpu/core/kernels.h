// What the scheduler asks of one instruction-set level. The file kernels.cpp is compiled once per level; nothing in it
// may be shared between levels (an inline function compiled for AVX-512 must not end up on a machine without it), so
// kernels allocate nothing and use no standard containers.
#pragma once

#include "kvcompress/blocks.h"
#include "kvcompress/heads.h"
#include "kvcompress/latent.h"
#include "kvcompress/shared.h"

#include <cstddef>

namespace kvcompress::cpu {

constexpr int kGroup = 16;  // tokens whose codes are unpacked together; divides every block size
constexpr int kTile = 64;  // tokens between two updates of the running softmax
constexpr int kTileGroups = kTile / kGroup;
constexpr int kMaxRows = 64;  // rows (query token x query head of the group) attended together
constexpr int kMaxHeadDim = KVC_MAX_HEAD_DIM;
constexpr int kMaxLowRank = KVC_BLOCKS_MAX_LOW_RANK;
constexpr int kMaxLatentChannels = KVC_MAX_LATENT_CHANNELS;  // of MLA, or of a latent that layers share
constexpr int kAppendTokens = 8;  // tokens encoded together, for one reading of the projection
constexpr size_t kAlign = 64;

// Rows of one KV head of one request, or of several neighbours: `tokens` query tokens from `first_token` on, each with
// its group of query heads. Rows are [KV head][token][query head].
struct Item {
    int request;
    int kv_head;
    int first_token;  // within the request's queries
    int tokens;
    int first_group;  // first query head of the KV head's group
    int group;  // query heads attended
    int kv_heads;

    int rows_per_head() const { return tokens * group; }
    int rows() const { return kv_heads * rows_per_head(); }
};

// Running softmax of an item's rows: maxima, sums and unnormalised values [rows][width].
struct Partial {
    float* max;
    float* sum;
    float* latent;
};

// Attention over one form of cache.
template <typename Args>
struct Attention {
    size_t (*scratch_bytes)(const Args&);
    // Floats of a row's unnormalised values.
    int (*width)(const Args&);
    // Attend tokens [start, stop) of the item's request; overwrites `partial`.
    void (*attend)(const Args&, const Item&, int start, int stop, const Partial& partial, void* scratch);
    // Fold `from` into `into`.
    void (*merge)(const Args&, const Item&, const Partial& into, const Partial& from);
    // Unnormalised values to outputs.
    void (*finish)(const Args&, const Item&, const Partial& partial, void* scratch);
};

struct Kernels {
    Attention<kvc_heads_attend_args> attention;
    size_t (*append_scratch_bytes)(const kvc_heads_append_args&);
    // Encode and store one head of up to kAppendTokens tokens.
    void (*append)(const kvc_heads_append_args&, int64_t first, int count, int head, void* scratch);
    Attention<kvc_blocks_attend_args> block_attention;
    Attention<kvc_latent_attend_args> latent_attention;
    void (*latent_append)(const kvc_latent_append_args&, int64_t token);
    Attention<kvc_shared_attend_args> shared_attention;
    size_t (*store_scratch_bytes)();
    // Encode and store one token's records.
    void (*store)(const kvc_shared_store_args&, int64_t token, void* scratch);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}

}  // namespace kvcompress::cpu
