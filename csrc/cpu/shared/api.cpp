// The C interface of layers that share a latent.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {

static bool covered(const kvc_shared_records& records, int channels) {
    return records.block_size > 0 && records.block_size % kGroup == 0 && records.records > 0 &&
           records.side.outliers == 0 && records.token_bytes >= records.side.code_offset + records.side.code_bytes &&
           covered(records.side, channels);
}

static bool covered(const kvc_shared_attend_args& args) {
    const bool keys_shared = args.rope_frequency_F != nullptr;
    if (args.head_dim <= 0 || args.head_dim > kMaxHeadDim || args.head_dim % 8 || args.num_kv_heads <= 0 ||
        args.num_stripes <= 0)
        return false;
    if (args.num_k != (keys_shared ? args.num_stripes : 1) ||
        args.k[0].records != (keys_shared ? 1 : args.num_kv_heads))
        return false;
    for (int stripe = 0; stripe < args.num_k; ++stripe)
        if (!covered(args.k[stripe], keys_shared ? kMaxLatentChannels : args.head_dim)) return false;
    for (int stripe = 0; stripe < args.num_stripes; ++stripe)
        if (!covered(args.v[stripe], kMaxLatentChannels)) return false;
    if (args.num_stripes * args.v[0].side.rank > kMaxLatentChannels ||
        args.num_k * args.k[0].side.rank > kMaxLatentChannels)
        return false;
    const int level = args.run.level < kvc_best_level() ? args.run.level : kvc_best_level();
    return !keys_shared || args.k_decode_blocked || (args.k_codes_blocked && level >= KVC_AVX512VNNI);
}

template <>
struct Form<kvc_shared_attend_args> {
    // Values are unpacked once for all heads of an item.
    static constexpr bool together = true;
    static int kv_heads(const kvc_shared_attend_args& args) { return args.num_kv_heads; }
    static int32_t check(const kvc_shared_attend_args& args, int request, int length) {
        const int stored = args.exact.stored_lens[request];
        if (stored < 0 || stored > length) return KVC_BAD_LENGTH;
        const auto check_records = [&](const kvc_shared_records& records, int tokens) {
            return check_blocks(records.block_table, records.block_table_stride, request, tokens, records.block_size,
                                records.num_blocks);
        };
        for (int stripe = 0; stripe < args.num_k; ++stripe) {
            const int32_t status = check_records(args.k[stripe], args.rope_frequency_F ? stored : length);
            if (status != KVC_OK) return status;
        }
        for (int stripe = 0; stripe < args.num_stripes; ++stripe) {
            const int32_t status = check_records(args.v[stripe], stored);
            if (status != KVC_OK) return status;
        }
        return KVC_OK;
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_shared_attend(const kvc_shared_attend_args* args) {
    if (!covered(*args) || !covered(args->batch, args->run, args->num_kv_heads, kTile)) return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->run.level).shared_attention);
}

int32_t kvc_shared_store(const kvc_shared_store_args* args) {
    if (!covered(args->records, kMaxHeadDim) || args->latents.dtype != KVC_FLOAT32) return KVC_BAD_SHAPE;
    if (!check_slots(args->slots, args->num_tokens, args->records.num_blocks * args->records.block_size))
        return KVC_BAD_BLOCK;
    const Kernels& kernels = kernels_of(args->run.level);
    const int threads = args->num_tokens * args->records.records < 64 ? 1 : args->run.threads;
    const bool ok = parallel(args->num_tokens, threads, kernels.store_scratch_bytes(),
                             [&](int64_t token, char* memory) { kernels.store(*args, token, memory); });
    return ok ? KVC_OK : KVC_NO_MEMORY;
}
