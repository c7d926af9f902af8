// The C interface of the form `blocks`, and its kernels: attention on complete blocks for every listed pair of widths, of
// keys and of values, attention on newer tokens, and their rings.
#include "kvcompress/blocks.h"

#include "cuda/blocks/decode.h"
#include "cuda/blocks/rings.h"
#include "cuda/core/absorbed.h"

namespace kvcompress::cuda {
namespace {

bool make_side(const kvc_blocks_side& from, bool keys, BlockSide& side) {
    if (from.rank <= 0 || from.rank > kMaxColumns * kColumn || from.rank % 16) return false;
    if (from.low_rank < 0 || from.low_rank > kMaxLowRank || from.low_rank % 2 || from.outliers < 0 ||
        from.outliers > kChunk * from.rank || from.outliers % 8)
        return false;
    if (keys ? from.group < kChunk : from.group < from.rank && (from.group <= 0 || from.group % kColumn)) return false;
    side.rank = from.rank, side.low_rank = from.low_rank, side.outliers = from.outliers;
    side.groups = keys || from.group >= from.rank ? 1 : columns_of(from.rank);
    side.reciprocal = static_cast<uint32_t>(((static_cast<uint64_t>(1) << 32) + static_cast<uint64_t>(from.rank) - 1) /
                                            static_cast<uint64_t>(from.rank));
    side.bytes = from.nbytes;
    const auto within = [&](int64_t offset) { return static_cast<int>(offset - from.code_offset); };
    side.scale_offset = within(from.scale_offset), side.zero_offset = within(from.zero_offset);
    side.token_offset = within(from.token_offset), side.channel_offset = within(from.channel_offset);
    side.value_offset = within(from.value_offset), side.place_offset = within(from.place_offset);
    return side.bytes > 0 && side.bytes % 16 == 0;
}

bool make_args(const kvc_blocks_pages& from, BlockArgs& args) {
    Pages& pages = args.attend.pages;
    if (!make_places(from, pages) || from.block != kChunk || from.record_bytes % 16) return false;
    if (!make_side(from.k, true, args.k) || !make_side(from.v, false, args.v)) return false;
    if (from.k.code_offset != 0 || from.v.code_offset != from.k.nbytes) return false;
    pages.k.rank = args.k.rank, pages.v.rank = args.v.rank;
    args.record_bytes = from.record_bytes;
    args.stage_bytes = args.k.bytes > args.v.bytes ? args.k.bytes : args.v.bytes;
    return true;
}

int64_t lay_out(BlockArgs& args, int warps) {
    Arena arena;
    const int outliers = args.k.outliers > args.v.outliers ? args.k.outliers : args.v.outliers;
    arena.take(8 * kStages * kMaxThreads / 32);  // barriers
    args.attend.query_at = arena.take(16 * kColumn * columns_of(args.k.rank));
    args.code_query_at = arena.take(16 * kColumn * columns_of(args.k.rank));
    args.attend.factor_at = arena.take(4 * kRows);
    args.scratch_bytes = outliers ? 2 * (kScratchEntries + outliers) : 0;
    args.scratch_at = arena.take(static_cast<int64_t>(warps) * args.scratch_bytes);
    const int64_t ring = static_cast<int64_t>(kStages) * args.stage_bytes, merge = 4 * kRows * (args.v.rank + 2);
    args.attend.stages_at = arena.take(warps * (ring > merge ? ring : merge));
    return arena.used;
}

bool aligned(const void* data, int64_t first_stride, int64_t second_stride, int dtype) {
    const int64_t entry = dtype == KVC_FLOAT32 ? 4 : 2;
    return on_16_bytes(data, entry * first_stride, entry * second_stride);
}

Rings rings_of(const kvc_blocks_rings& rings) {
    return {rings.data, rings.ring_stride, rings.head_stride, rings.places, rings.dtype};
}

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

int32_t kvc_cuda_blocks_attend(const kvc_blocks_pages* pages, const kvc_absorbed* absorbed) {
    BlockArgs args{};
    if (!make_args(*pages, args)) return -KVC_BAD_SHAPE;
    const auto start = [&](const LaunchShape& shape) -> int {
#define KVC_TRY(K_BITS, V_BITS)                             \
    if (pages->k.bits == K_BITS && pages->v.bits == V_BITS) \
        return launch<decode_blocks<K_BITS, V_BITS>>(shape.grid, shape.threads, shape.shared_bytes, shape.stream, args);
        KVC_BLOCKS_CUDA_WIDTHS(KVC_TRY)
#undef KVC_TRY
        return -KVC_BAD_SHAPE;
    };
    return attend_absorbed(*absorbed, args.attend, [&](int warps) { return lay_out(args, warps); }, start);
}

int32_t kvc_cuda_blocks_attend_newest(const kvc_blocks_newest_args* from) {
    const int dtype = from->rings.dtype;
    const bool fits =
        from->block == kChunk && from->head_dim > 0 && from->head_dim <= kExactHeadDim && from->head_dim % 8 == 0;
    if (!fits || from->batch.num_heads <= 0 || from->num_kv_heads <= 0 || from->batch.num_heads % from->num_kv_heads ||
        from->rings.places < kChunk)
        return -KVC_BAD_SHAPE;
    if (!aligned(from->rings.data, from->rings.ring_stride, from->rings.head_stride, dtype)) return -KVC_BAD_SHAPE;
    for (const kvc_rows* rows : {&from->keys, &from->values})
        if (!aligned(rows->data, rows->token_stride, rows->head_stride, rows->dtype)) return -KVC_BAD_SHAPE;
    if (from->batch.num_requests == 0 || from->run.max_query_len == 0) return KVC_OK;
    NewestArgs args{};
    set_batch(from->batch, from->run, from->num_kv_heads, args.attend);
    args.attend.output = const_cast<float*>(from->sealed_THD),
    args.attend.lse = const_cast<float*>(from->sealed_lse_TH);
    args.rings = rings_of(from->rings), args.ring_of = from->ring_of;
    args.query = token_rows(from->query), args.keys = token_rows(from->keys), args.values = token_rows(from->values);
    args.output = const_cast<void*>(from->output.data), args.output_dtype = from->output.dtype;
    args.output_token_stride = from->output.token_stride, args.output_head_stride = from->output.head_stride;
    args.lse = from->lse_TH, args.k_mean = from->k_mean_HD, args.v_mean = from->v_mean_HD;
    args.head_dim = from->head_dim;
    const int64_t bytes = 4 * (2 * kMaxExact * (args.head_dim + 4) + kRows * args.head_dim + kMaxExact * kRows + kRows);
    return launch<attend_newest>({1, from->num_kv_heads * args.attend.row_tiles, from->batch.num_requests}, kMaxThreads,
                                 bytes, from->run.stream, args);
}

int32_t kvc_cuda_blocks_keep(const kvc_blocks_keep_args* from) {
    if (from->rings.places <= 0 || from->num_kv_heads <= 0 || from->head_dim <= 0) return -KVC_BAD_SHAPE;
    if (from->batch.num_requests == 0 || from->run.num_tokens == 0) return KVC_OK;
    const KeepArgs args{rings_of(from->rings),    from->ring_of,          from->batch.query_starts,
                        from->batch.seq_lens,     token_rows(from->keys), token_rows(from->values),
                        from->batch.num_requests, from->head_dim};
    return launch<keep>({static_cast<int>(from->run.num_tokens), from->num_kv_heads, 1}, kEncodeThreads, 0,
                        from->run.stream, args);
}
