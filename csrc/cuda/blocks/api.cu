// The C interface of the form `blocks`, and its kernels: attention on complete blocks for every listed pair of widths, of
// keys and of values, attention on newer tokens, and their rings.
#include "kvcompress/cuda_blocks.h"

#include "cuda/core/arena.h"
#include "cuda/blocks/decode.h"
#include "cuda/blocks/rings.h"
#include "cuda/core/combine.h"

#define KVC_BLOCK_INSTANCES(X) X(8, 8) X(4, 4) X(4, 2) X(2, 2)

namespace kvcompress::cuda {
namespace {

bool make_side(const kvc_block_side& from, bool keys, BlockSide& side) {
    if (from.rank <= 0 || from.rank > kMaxColumns * kColumn || from.rank % 16) return false;
    if (from.low_rank < 0 || from.low_rank > kMaxLowRank || from.low_rank % 2 || from.outliers < 0 || from.outliers > kChunk * from.rank || from.outliers % 8)
        return false;
    if (keys ? from.group < kChunk : from.group < from.rank && (from.group <= 0 || from.group % kColumn)) return false;
    side.rank = from.rank, side.low_rank = from.low_rank, side.outliers = from.outliers;
    side.groups = keys || from.group >= from.rank ? 1 : columns_of(from.rank);
    side.reciprocal = static_cast<uint32_t>(((static_cast<uint64_t>(1) << 32) + static_cast<uint64_t>(from.rank) - 1) / static_cast<uint64_t>(from.rank));
    side.bytes = from.nbytes;
    const auto within = [&](int64_t offset) { return static_cast<int>(offset - from.code_offset); };
    side.scale_offset = within(from.scale_offset), side.zero_offset = within(from.zero_offset);
    side.token_offset = within(from.token_offset), side.channel_offset = within(from.channel_offset);
    side.value_offset = within(from.value_offset), side.place_offset = within(from.place_offset);
    return side.bytes > 0 && side.bytes % 16 == 0;
}

bool make_args(const kvc_block_pages& from, BlockArgs& args) {
    Pages& pages = args.attend.pages;
    pages.data = from.data;
    pages.block_stride = from.block_stride, pages.head_stride = from.head_stride;
    pages.num_heads = from.num_kv_heads;
    while (kChunk << pages.page_shift < from.block_size) ++pages.page_shift;
    if (from.block != kChunk || kChunk << pages.page_shift != from.block_size || from.num_kv_heads <= 0) return false;
    // Copies are of 16 bytes.
    if (reinterpret_cast<uintptr_t>(from.data) % 16 || from.block_stride % 16 || from.head_stride % 16 || from.record_bytes % 16) return false;
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

// What a kernel of either kind knows of the batch.
template <typename Args>
void set_batch(const Args& from, int num_kv_heads, AttendArgs& args) {
    args.pages.num_heads = num_kv_heads;
    args.query_starts = from.query_starts, args.seq_lens = from.seq_lens;
    args.num_heads = from.num_heads, args.group = from.num_heads / num_kv_heads;
    args.row_tiles = (from.max_query_len * args.group + kRows - 1) / kRows;
    args.softmax_scale = from.softmax_scale;
}

bool aligned(const void* data, int64_t first_stride, int64_t second_stride, int dtype) {
    const int64_t entries = 16 / (dtype == kFloat32 ? 4 : 2);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && first_stride % entries == 0 && second_stride % entries == 0;
}

TokenRows token_rows(const kvc_rows& rows) { return {rows.data, rows.token_stride, rows.head_stride, rows.dtype}; }
Rings rings_of(const kvc_rings& rings) { return {rings.data, rings.ring_stride, rings.head_stride, rings.places, rings.dtype}; }

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

void kvc_cuda_block_struct_sizes(int64_t sizes[3]) {
    sizes[0] = sizeof(kvc_cuda_block_attend_args);
    sizes[1] = sizeof(kvc_cuda_newest_args);
    sizes[2] = sizeof(kvc_cuda_keep_args);
}

int32_t kvc_cuda_attend_blocks(const kvc_cuda_block_attend_args* from) {
    BlockArgs args{};
    if (!make_args(from->pages, args) || from->splits < 1 || from->num_heads <= 0 || from->num_heads % from->pages.num_kv_heads)
        return -KVC_BAD_SHAPE;
    if (from->num_requests == 0 || from->max_query_len == 0) return KVC_OK;
    AttendArgs& attend = args.attend;
    set_batch(*from, from->pages.num_kv_heads, attend);
    attend.query = from->query_THR;
    attend.rows = from->num_tokens * from->num_heads;
    const int64_t partial = from->splits > 1 ? from->splits * attend.rows : 0;
    attend.output = partial ? from->workspace : from->output_THR;
    attend.lse = partial ? from->workspace + partial * args.v.rank : from->lse_TH;
    attend.table = from->block_table, attend.table_stride = from->block_table_stride;
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    int warps = kMaxThreads / 32;
    while (warps > 1 && lay_out(args, warps) > limit) warps /= 2;
    const int64_t shared_bytes = lay_out(args, warps);
    if (shared_bytes > limit) return -KVC_BAD_SHAPE;
    const Grid grid{from->splits, from->pages.num_kv_heads * attend.row_tiles, from->num_requests};
    int error = -KVC_BAD_SHAPE;
#define KVC_TRY(K_BITS, V_BITS)                                   \
    if (from->pages.k.bits == K_BITS && from->pages.v.bits == V_BITS) \
        error = launch<decode_blocks<K_BITS, V_BITS>>(grid, 32 * warps, shared_bytes, from->stream, args);
    KVC_BLOCK_INSTANCES(KVC_TRY)
#undef KVC_TRY
    if (error || !partial) return error;
    const CombineArgs merge{attend.output, attend.lse, from->output_THR, from->lse_TH, from->query_starts, from->splits,
                            args.v.rank, from->num_heads, attend.group, attend.rows};
    return launch<combine>({from->max_query_len * attend.group, from->pages.num_kv_heads, from->num_requests}, kMaxThreads, 0, from->stream, merge);
}

int32_t kvc_cuda_attend_newest(const kvc_cuda_newest_args* from) {
    const int dtype = from->rings.dtype;
    const bool fits = from->block == kChunk && from->head_dim > 0 && from->head_dim <= kExactHeadDim && from->head_dim % 8 == 0;
    if (!fits || from->num_heads <= 0 || from->num_kv_heads <= 0 || from->num_heads % from->num_kv_heads || from->rings.places < kChunk)
        return -KVC_BAD_SHAPE;
    if (!aligned(from->rings.data, from->rings.ring_stride, from->rings.head_stride, dtype)) return -KVC_BAD_SHAPE;
    for (const kvc_rows* rows : {&from->keys, &from->values})
        if (!aligned(rows->data, rows->token_stride, rows->head_stride, rows->dtype)) return -KVC_BAD_SHAPE;
    if (from->num_requests == 0 || from->max_query_len == 0) return KVC_OK;
    NewestArgs args{};
    set_batch(*from, from->num_kv_heads, args.attend);
    args.attend.output = const_cast<float*>(from->sealed_THD), args.attend.lse = const_cast<float*>(from->sealed_lse_TH);
    args.rings = rings_of(from->rings), args.ring_of = from->ring_of;
    args.query = token_rows(from->query), args.keys = token_rows(from->keys), args.values = token_rows(from->values);
    args.output = const_cast<void*>(from->output.data), args.output_dtype = from->output.dtype;
    args.output_token_stride = from->output.token_stride, args.output_head_stride = from->output.head_stride;
    args.lse = from->lse_TH, args.k_mean = from->k_mean_HD, args.v_mean = from->v_mean_HD;
    args.head_dim = from->head_dim;
    const int64_t bytes = 4 * (2 * kMaxExact * (args.head_dim + 4) + kRows * args.head_dim + kMaxExact * kRows + kRows);
    return launch<attend_newest>({1, from->num_kv_heads * args.attend.row_tiles, from->num_requests}, kMaxThreads, bytes, from->stream, args);
}

int32_t kvc_cuda_keep(const kvc_cuda_keep_args* from) {
    if (from->rings.places <= 0 || from->num_kv_heads <= 0 || from->head_dim <= 0) return -KVC_BAD_SHAPE;
    if (from->num_requests == 0 || from->num_tokens == 0) return KVC_OK;
    const KeepArgs args{rings_of(from->rings), from->ring_of, from->query_starts, from->seq_lens, token_rows(from->keys), token_rows(from->values),
                        from->num_requests, from->head_dim};
    return launch<keep>({static_cast<int>(from->num_tokens), from->num_kv_heads, 1}, kEncodeThreads, 0, from->stream, args);
}
