// The C interface of MLA latents.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {

static bool covered(const kvc_latent_pages& pages) {
    return pages.block_size > 0 && pages.channels > 0 && pages.channels <= kMaxLatentChannels &&
           pages.dtype >= KVC_FLOAT32 && pages.dtype <= KVC_FLOAT16;
}

template <>
struct Form<kvc_latent_attend_args> {
    static constexpr bool together = false;
    static int kv_heads(const kvc_latent_attend_args&) { return 1; }
    static int32_t check(const kvc_latent_attend_args& args, int request, int length) {
        return check_blocks(args.batch, request, length, args.pages.block_size, args.pages.num_blocks);
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_latent_attend(const kvc_latent_attend_args* args) {
    if (!covered(args->pages) || !covered(args->batch, args->run, 1, kTile) || args->rank <= 0 ||
        args->rank > args->pages.channels)
        return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->run.level).latent_attention);
}

int32_t kvc_latent_append(const kvc_latent_append_args* args) {
    if (!covered(args->pages)) return KVC_BAD_SHAPE;
    if (!check_slots(args->slots, args->num_tokens, args->pages.num_blocks * args->pages.block_size))
        return KVC_BAD_BLOCK;
    const Kernels& kernels = kernels_of(args->run.level);
    for (int64_t token = 0; token < args->num_tokens; ++token) kernels.latent_append(*args, token);
    return KVC_OK;
}
