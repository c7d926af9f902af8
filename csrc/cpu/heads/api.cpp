// The C interface of the form `heads`.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {

static bool covered(const kvc_heads_pages& pages) {
    return pages.head_dim > 0 && pages.head_dim <= kMaxHeadDim && pages.head_dim % 8 == 0 && pages.block_size > 0 &&
           pages.block_size % kGroup == 0 && pages.num_kv_heads > 0 && covered(pages.k, pages.head_dim) &&
           covered(pages.v, pages.head_dim);
}

template <>
struct Form<kvc_heads_attend_args> {
    static constexpr bool together = false;
    static int kv_heads(const kvc_heads_attend_args& args) { return args.pages.num_kv_heads; }
    static int32_t check(const kvc_heads_attend_args& args, int request, int length) {
        return check_blocks(args.batch, request, length, args.pages.block_size, args.pages.num_blocks);
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_heads_attend(const kvc_heads_attend_args* args) {
    if (!covered(args->pages) || !covered(args->batch, args->run, args->pages.num_kv_heads, kTile))
        return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->run.level).attention);
}

int32_t kvc_heads_append(const kvc_heads_append_args* args) {
    if (!covered(args->pages)) return KVC_BAD_SHAPE;
    if (!check_slots(args->slots, args->num_tokens, args->pages.num_blocks * args->pages.block_size))
        return KVC_BAD_BLOCK;
    const Kernels& kernels = kernels_of(args->run.level);
    const int heads = args->pages.num_kv_heads;
    const int64_t chunks = (args->num_tokens + kAppendTokens - 1) / kAppendTokens;
    // A few tokens pay for waking threads only by sharing the reading of large projections, which a decode step finds in
    // memory: the rest of the model has passed through the caches since the last one.
    const int64_t projection_floats =
        static_cast<int64_t>(heads) * args->pages.head_dim * (args->pages.k.rank + args->pages.v.rank);
    const int threads = args->num_tokens * heads < 64 && projection_floats < 65536 ? 1 : args->run.threads;
    const bool ok =
        parallel(chunks * heads, threads, kernels.append_scratch_bytes(*args), [&](int64_t index, char* memory) {
            const int64_t first = index / heads * kAppendTokens, left = args->num_tokens - first;
            kernels.append(*args, first, static_cast<int>(left < kAppendTokens ? left : kAppendTokens),
                           static_cast<int>(index % heads), memory);
        });
    return ok ? KVC_OK : KVC_NO_MEMORY;
}
