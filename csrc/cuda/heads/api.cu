// The C interface: checks, what kernels need to know of a side, choice of instance and of shared memory.
#include "kvcompress/cuda.h"

#include "cuda/core/arena.h"
#include "cuda/core/combine.h"
#include "cuda/heads/instances.h"
#include "cuda/core/tokens.h"

namespace kvcompress::cuda {
namespace {

bool make_side(const kvc_side& from, Side& side) {
    side = {};
    if (from.num_bands < 1 || from.num_bands > KVC_MAX_BANDS || from.rank > kMaxRank || from.outliers < 0 || from.outliers > kMaxOutliers)
        return false;
    side.rank = from.rank, side.outliers = from.outliers;
    side.gain_offset = static_cast<int>(from.gain_offset), side.outlier_offset = static_cast<int>(from.outlier_offset);
    side.channel_offset = static_cast<int>(from.channel_offset);
    int offset = static_cast<int>(from.code_offset), channel = 0;
    for (int band = 0; band < from.num_bands; ++band) {
        const int bits = from.bits[band], width = from.widths[band];
        if ((bits != 16 && bits != 8 && bits != 4 && bits != 2) || width <= 0 || width % kGroup) return false;
        if ((bits == 16) != (from.gain_offset < 0) || (bits == 16 && (from.num_bands > 1 || from.outliers))) return false;
        for (int left = width / kGroup; left > 0; left -= 2) {
            const int units = left > 1 ? 2 : 1;
            if (side.num_tiles == kMaxTiles) return false;
            side.tiles[side.num_tiles++] = {offset, channel, units, bits, from.steps[band]};
            offset += units * unit_bytes(bits), channel += units * kGroup;
        }
    }
    return channel == side.rank;
}

bool make_pages(const kvc_pages& from, Pages& pages) {
    pages = {};
    pages.data = from.data;
    pages.block_stride = from.block_stride, pages.head_stride = from.head_stride;
    pages.num_heads = from.num_kv_heads;
    while (kChunk << pages.page_shift < from.block_size) ++pages.page_shift;
    if (kChunk << pages.page_shift != from.block_size || from.num_kv_heads <= 0) return false;
    // Copies are of 16 bytes.
    if (reinterpret_cast<uintptr_t>(from.data) % 16 || from.block_stride % 16 || from.head_stride % 16) return false;
    if (!make_side(from.k, pages.k) || !make_side(from.v, pages.v)) return false;
    const auto part_bytes = [](const kvc_side& side) {
        return (side.gain_offset < 0 ? 0 : 2) + 3 * side.outliers + static_cast<int>(side.code_bytes);
    };
    pages.chunk_bytes = kChunk * (part_bytes(from.k) + part_bytes(from.v));
    return true;
}

// Bits of a side whose channels all have the same and fill whole tiles, or 0.
int uniform_bits(const Side& side, bool outliers) {
    for (int tile = 0; tile < side.num_tiles; ++tile)
        if (side.tiles[tile].bits != side.tiles[0].bits || side.tiles[tile].units != 2) return 0;
    return has_tiles(side.num_tiles, outliers) ? side.tiles[0].bits : 0;
}

int start_any(const LaunchShape& shape, bool outliers, const AttendArgs& args) {
    const Side &k = args.pages.k, &v = args.pages.v;
    const int k_bits = uniform_bits(k, outliers), v_bits = k.num_tiles == v.num_tiles ? uniform_bits(v, outliers) : 0;
#define KVC_TRY(K_BITS, V_BITS) \
    if (K_BITS && k_bits == K_BITS && v_bits == V_BITS) return start_decode<K_BITS, V_BITS>(shape, outliers, args);
    KVC_DECODE_INSTANCES(KVC_TRY)
#undef KVC_TRY
    return start_decode<0, 0>(shape, outliers, args);
}

// Where things are in shared memory, for this many warps; its size.
int64_t lay_out(AttendArgs& args, bool outliers, int warps) {
    const Side &k = args.pages.k, &v = args.pages.v;
    Arena arena;
    arena.take(8 * kStages * kMaxThreads / 32);  // barriers
    args.query_at = arena.take(256 * k.num_tiles);
    args.start_at = arena.take(4 * kPairs * kRows);
    args.factor_at = arena.take(4 * kRows);
    args.exact_query_at = arena.take(outliers && k.outliers ? 4 * kRows * k.rank : 0);
    args.exact_sum_at = arena.take(outliers && v.outliers ? 4 * kRows * v.rank * warps : 0);
    const int64_t ring = static_cast<int64_t>(kStages) * args.pages.chunk_bytes, merge = 4 * kRows * (v.rank + 2);
    args.stages_at = arena.take(warps * (ring > merge ? ring : merge));
    return arena.used;
}

// As many warps as there is room for; 0 for none.
int warps_for(AttendArgs& args, bool outliers, int64_t limit) {
    int warps = kMaxThreads / 32;
    while (warps && lay_out(args, outliers, warps) > limit) warps /= 2;
    return warps;
}

EncodeSide encode_side(const kvc_rows& rows, const float* mean, const float* encode, const float* weight) {
    return {{rows.data, rows.token_stride, rows.head_stride, rows.dtype}, mean, encode, weight};
}

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

int32_t kvc_cuda_abi_version(void) { return KVC_CUDA_ABI_VERSION; }

void kvc_cuda_struct_sizes(int64_t sizes[3]) {
    sizes[0] = sizeof(kvc_cuda_attend_args);
    sizes[1] = sizeof(kvc_cuda_append_args);
    sizes[2] = sizeof(kvc_cuda_gather_args);
}

const char* kvc_cuda_error_text(int32_t error) { return error_text(error); }

int32_t kvc_cuda_covers(const kvc_pages* pages) {
    AttendArgs args{};
    if (!make_pages(*pages, args.pages)) return -KVC_BAD_SHAPE;
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    return warps_for(args, pages->k.outliers || pages->v.outliers, limit) ? KVC_OK : -KVC_BAD_SHAPE;
}

int32_t kvc_cuda_attend(const kvc_cuda_attend_args* from) {
    AttendArgs args{};
    if (!make_pages(from->pages, args.pages) || from->splits < 1 || from->num_heads <= 0 || from->num_heads % args.pages.num_heads)
        return -KVC_BAD_SHAPE;
    if (from->num_requests == 0 || from->max_query_len == 0) return KVC_OK;
    const bool outliers = args.pages.k.outliers || args.pages.v.outliers;
    args.query = from->query_THR;
    args.rows = from->num_tokens * from->num_heads;
    const int64_t partial = from->splits > 1 ? from->splits * args.rows : 0;
    args.output = partial ? from->workspace : from->output_THR;
    args.lse = partial ? from->workspace + partial * args.pages.v.rank : from->lse_TH;
    args.table = from->block_table, args.table_stride = from->block_table_stride;
    args.query_starts = from->query_starts, args.seq_lens = from->seq_lens;
    args.num_heads = from->num_heads, args.group = from->num_heads / args.pages.num_heads;
    args.row_tiles = (from->max_query_len * args.group + kRows - 1) / kRows;
    args.softmax_scale = from->softmax_scale;
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    const int warps = warps_for(args, outliers, limit);
    if (!warps) return -KVC_BAD_SHAPE;
    const int64_t shared_bytes = lay_out(args, outliers, warps);
    const LaunchShape shape{{from->splits, args.pages.num_heads * args.row_tiles, from->num_requests}, 32 * warps, shared_bytes, from->stream};
    const int error = start_any(shape, outliers, args);
    if (error || !partial) return error;
    const CombineArgs merge{args.output, args.lse, from->output_THR, from->lse_TH, from->query_starts, from->splits,
                            args.pages.v.rank, from->num_heads, args.group, args.rows};
    return launch<combine>({from->max_query_len * args.group, args.pages.num_heads, from->num_requests}, kMaxThreads, 0, from->stream, merge);
}

int32_t kvc_cuda_append(const kvc_cuda_append_args* from) {
    EncodeArgs args{};
    if (!make_pages(from->pages, args.pages)) return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    args.k = encode_side(from->keys, from->k_mean_HD, from->k_encode_HDR, from->k_weight_HR);
    args.v = encode_side(from->values, from->v_mean_HD, from->v_encode_HDR, from->v_weight_HR);
    args.slots = from->slots, args.blocks = from->blocks;
    args.num_tokens = from->num_tokens;
    args.num_slots = from->pages.num_blocks * from->pages.block_size;
    args.head_dim = from->pages.head_dim;
    if (!from->blocks) return start_append(args, from->stream);
    if (from->num_tokens % from->pages.block_size) return -KVC_BAD_LENGTH;
    return start_compress(args, from->stream);
}

int32_t kvc_cuda_gather(const kvc_cuda_gather_args* from) {
    GatherArgs args{};
    if (!make_pages(from->pages, args.pages)) return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    args.keys = from->keys_THR, args.values = from->values_THR, args.dtype = from->dtype;
    args.table = from->block_table, args.num_tokens = static_cast<int>(from->num_tokens);
    return start_gather(args, from->stream);
}
