// The C interface of the form `heads`: checks, what kernels need to know of a side, choice of instance and of shared memory.
#include "kvcompress/heads.h"

#include "cuda/core/absorbed.h"
#include "cuda/core/pipeline.h"
#include "cuda/heads/instances.h"
#include "cuda/heads/tokens.h"

namespace kvcompress::cuda {
namespace {

bool make_side(const kvc_side& from, Side& side) {
    side = {};
    if (from.rank > kMaxRank || from.outliers < 0 || from.outliers > KVC_MAX_OUTLIERS ||
        (from.gain_offset < 0 && from.outliers))
        return false;
    side.rank = from.rank, side.outliers = from.outliers;
    side.gain_offset = static_cast<int>(from.gain_offset), side.outlier_offset = static_cast<int>(from.outlier_offset);
    side.channel_offset = static_cast<int>(from.channel_offset);
    return make_tiles(from, kChunk, kMaxTiles, side.tiles, side.num_tiles);
}

bool make_pages(const kvc_heads_pages& from, Pages& pages) {
    pages = {};
    if (!make_places(from, pages) || !make_side(from.k, pages.k) || !make_side(from.v, pages.v)) return false;
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
    KVC_HEADS_CUDA_WIDTHS(KVC_TRY)
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

EncodeSide encode_side(const kvc_rows& rows, const kvc_heads_encoder& encoder) {
    return {token_rows(rows), encoder.mean_HD, encoder.encode_HDR, encoder.weight_HR};
}

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

int32_t kvc_cuda_abi_version(void) { return KVC_ABI_VERSION; }

const char* kvc_cuda_error_text(int32_t error) { return error_text(error); }

int32_t kvc_cuda_heads_covers(const kvc_heads_pages* pages) {
    AttendArgs args{};
    if (!make_pages(*pages, args.pages)) return -KVC_BAD_SHAPE;
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    const bool outliers = pages->k.outliers || pages->v.outliers;
    return warps_for(limit, [&](int warps) { return lay_out(args, outliers, warps); }) ? KVC_OK : -KVC_BAD_SHAPE;
}

int32_t kvc_cuda_heads_attend(const kvc_heads_pages* pages, const kvc_absorbed* absorbed) {
    AttendArgs args{};
    if (!make_pages(*pages, args.pages)) return -KVC_BAD_SHAPE;
    const bool outliers = pages->k.outliers || pages->v.outliers;
    return attend_absorbed(
        *absorbed, args, [&](int warps) { return lay_out(args, outliers, warps); },
        [&](const LaunchShape& shape) { return start_any(shape, outliers, args); });
}

int32_t kvc_cuda_heads_append(const kvc_heads_append_args* from) {
    EncodeArgs args{};
    if (!make_pages(from->pages, args.pages)) return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    args.k = encode_side(from->keys, from->k), args.v = encode_side(from->values, from->v);
    args.slots = from->slots, args.blocks = from->blocks;
    args.num_tokens = from->num_tokens;
    args.num_slots = from->pages.num_blocks * from->pages.block_size;
    args.head_dim = from->pages.head_dim;
    if (!from->blocks) return start_append(args, from->run.stream);
    if (from->num_tokens % from->pages.block_size) return -KVC_BAD_LENGTH;
    return start_compress(args, from->run.stream);
}

int32_t kvc_cuda_heads_gather(const kvc_heads_gather_args* from) {
    GatherArgs args{};
    if (!make_pages(from->pages, args.pages)) return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    args.keys = from->keys_THR, args.values = from->values_THR, args.dtype = from->dtype;
    args.table = from->block_table, args.num_tokens = static_cast<int>(from->num_tokens);
    return start_gather(args, from->stream);
}
