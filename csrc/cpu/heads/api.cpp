// The C interface of the scalar form, and the choice of level.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {

const Kernels& kernels_of(int level) {
#ifdef KVC_X86
    if (level > kvc_best_level()) level = kvc_best_level();
    switch (level) {
        case KVC_AVX512_VNNI: return avx512vnni::kernels;
        case KVC_AVX512: return avx512::kernels;
        case KVC_AVX2: return avx2::kernels;
        default: return portable::kernels;
    }
#else
    (void)level;
    return portable::kernels;
#endif
}

bool covered(const kvc_side& side, int head_dim) {
    int rank = 0;
    int64_t bytes = 0;
    if (side.num_bands < 1 || side.num_bands > KVC_MAX_BANDS) return false;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], width = side.widths[band];
        if ((bits != 32 && bits != 16 && bits != 8 && bits != 4 && bits != 2) || width <= 0 || width % 8) return false;
        if ((bits >= 16) != (side.gain_offset < 0) || (bits >= 16 && side.num_bands > 1)) return false;
        rank += width;
        bytes += bits * width / 8;
    }
    if (side.outliers < 0 || side.outliers > KVC_MAX_OUTLIERS) return false;
    if (side.outliers && (side.gain_offset < 0 || side.outlier_offset < 0 || side.channel_offset < 0 || rank > 256)) return false;
    return rank == side.rank && rank <= head_dim && bytes == side.code_bytes;
}

static bool covered(const kvc_pages& pages) {
    return pages.head_dim > 0 && pages.head_dim <= kMaxHeadDim && pages.head_dim % 8 == 0 && pages.block_size > 0 &&
           pages.block_size % kGroup == 0 && pages.num_kv_heads > 0 && covered(pages.k, pages.head_dim) && covered(pages.v, pages.head_dim);
}

template <>
struct Form<kvc_attend_args> {
    static constexpr bool together = false;
    static int kv_heads(const kvc_attend_args& args) { return args.pages.num_kv_heads; }
    static int32_t check(const kvc_attend_args& args, int request, int length) {
        return check_blocks(args.block_table, args.block_table_stride, request, length, args.pages.block_size, args.pages.num_blocks);
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_abi_version(void) { return KVC_ABI_VERSION; }

void kvc_struct_sizes(int64_t sizes[7]) {
    sizes[0] = sizeof(kvc_attend_args);
    sizes[1] = sizeof(kvc_append_args);
    sizes[2] = sizeof(kvc_latent_attend_args);
    sizes[3] = sizeof(kvc_latent_append_args);
    sizes[4] = sizeof(kvc_shared_attend_args);
    sizes[5] = sizeof(kvc_store_args);
    sizes[6] = sizeof(kvc_block_attend_args);
}

int32_t kvc_best_level(void) {
#ifdef KVC_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return KVC_AVX512_VNNI;
    if (avx512) return KVC_AVX512;
    if (avx2) return KVC_AVX2;
#endif
    return KVC_PORTABLE;
}

int32_t kvc_attend(const kvc_attend_args* args) {
    if (!covered(args->pages) || args->num_heads <= 0 || args->num_heads % args->pages.num_kv_heads || args->split_tokens <= 0 ||
        args->split_tokens % kTile)
        return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->level).attention);
}

int32_t kvc_append(const kvc_append_args* args) {
    if (!covered(args->pages)) return KVC_BAD_SHAPE;
    const int64_t slots = args->pages.num_blocks * args->pages.block_size;
    for (int64_t token = 0; token < args->num_tokens; ++token)
        if (args->slots[token] >= slots) return KVC_BAD_BLOCK;
    const Kernels& kernels = kernels_of(args->level);
    const int heads = args->pages.num_kv_heads;
    const int64_t chunks = (args->num_tokens + kAppendTokens - 1) / kAppendTokens;
    // A few tokens pay for waking threads only by sharing the reading of large projections, which a decode step finds in
    // memory: the rest of the model has passed through the caches since the last one.
    const int64_t projection_floats = static_cast<int64_t>(heads) * args->pages.head_dim * (args->pages.k.rank + args->pages.v.rank);
    const int threads = args->num_tokens * heads < 64 && projection_floats < 65536 ? 1 : args->threads;
    const bool ok = parallel(chunks * heads, threads, kernels.append_scratch_bytes(*args), [&](int64_t index, char* memory) {
        const int64_t first = index / heads * kAppendTokens, left = args->num_tokens - first;
        kernels.append(*args, first, static_cast<int>(left < kAppendTokens ? left : kAppendTokens), static_cast<int>(index % heads), memory);
    });
    return ok ? KVC_OK : KVC_NO_MEMORY;
}
