// The C interface of the kernels for MLA latents: checks, choice of instance and of shared memory.
#include "kvcompress/latent.h"

#include <type_traits>

#include "cuda/core/launch.h"
#include "cuda/latent/append.h"
#include "cuda/latent/attend.h"
#include "cuda/latent/merge.h"

namespace kvcompress::cuda {
namespace {

template <auto VALUE>
using Number = std::integral_constant<decltype(VALUE), VALUE>;

bool is_sixteen_bits(int dtype) { return dtype == KVC_BFLOAT16 || dtype == KVC_FLOAT16; }

bool known_shape(const kvc_latent_pages& pages) {
    if (pages.block_size <= 0 || pages.channels <= 0 || pages.channels % 16 || !is_sixteen_bits(pages.dtype))
        return false;
    return on_16_bytes(pages.data, 2 * pages.block_stride, 2 * pages.token_stride);
}

// Where things are in shared memory; its size.
template <int ROWS, int TOKENS, bool WIDE>
int64_t lay_out(LatentArgs& args, int stages) {
    using Shape = LatentShape<ROWS, TOKENS>;
    Arena arena;
    args.stages = stages;
    arena.take(8 * stages);  // barriers
    args.state_at = arena.take(12 * ROWS);
    args.weight_at = arena.take(ROWS * Shape::kWeightPitch);
    args.score_at = arena.take(4 * Shape::kParts * ROWS * Shape::kScorePitch);
    args.query_at = arena.take(WIDE ? ROWS * (args.token_bytes + kTokenPadding) : 0);
    args.tile_at = arena.take(stages * static_cast<int64_t>(Tiles<TOKENS>::bytes(args.token_bytes)));
    return arena.used;
}

// As many tiles ahead as there is room for, with two blocks on a multiprocessor if the kernel is for two; 0: no room.
template <int ROWS, int TOKENS, bool WIDE>
int64_t fit(LatentArgs& args, int64_t limit) {
    // Of a multiprocessor's memory, each block's 1024 bytes are the system's.
    const int64_t half = (limit + 1024) / 2 - 1024;
    for (const int64_t room : {ROWS == 16 ? half : limit, limit})
        for (int stages = kMostTilesAhead + 1; stages > 1; --stages)
            if (const int64_t bytes = lay_out<ROWS, TOKENS, WIDE>(args, stages); bytes <= room) return bytes;
    return 0;
}

template <int ROWS, int TOKENS, bool WIDE>
int start(LatentArgs& args, bool bfloat16, int requests, int max_query_len, int64_t shared_bytes, void* stream) {
    const int row_tiles = (max_query_len * args.num_heads + ROWS - 1) / ROWS;
    const Grid grid{row_tiles * args.slices, args.splits, requests};
    return bfloat16
               ? launch<latent_attend<true, ROWS, TOKENS, WIDE>>(grid, kLatentThreads, shared_bytes, stream, args)
               : launch<latent_attend<false, ROWS, TOKENS, WIDE>>(grid, kLatentThreads, shared_bytes, stream, args);
}

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

int32_t kvc_cuda_latent_most_channels(int32_t* channels) {
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    LatentArgs args{};
    int most = 0;
    for (int next = 16; args.token_bytes = 2 * next, fit<16, 32, false>(args, limit) || fit<16, 16, true>(args, limit);
         next += 16)
        most = next;
    *channels = most;
    return KVC_OK;
}

int32_t kvc_cuda_latent_attend(const kvc_latent_attend_args* from) {
    const kvc_latent_pages& pages = from->pages;
    const kvc_batch& batch = from->batch;
    const kvc_run& run = from->run;
    if (!known_shape(pages) || from->rank <= 0 || from->rank > pages.channels || run.splits < 1 || batch.num_heads <= 0)
        return -KVC_BAD_SHAPE;
    if (from->query.dtype != pages.dtype || from->output.dtype != pages.dtype) return -KVC_BAD_SHAPE;
    if (reinterpret_cast<uintptr_t>(from->query.data) % 4 || from->query.token_stride % 2 ||
        from->query.head_stride % 2)
        return -KVC_BAD_SHAPE;
    if (batch.num_requests == 0 || run.max_query_len == 0) return KVC_OK;
    LatentArgs args{};
    args.pages = static_cast<const uint8_t*>(pages.data);
    args.block_stride = 2 * pages.block_stride, args.token_stride = 2 * pages.token_stride;
    args.block_size = pages.block_size, args.token_bytes = 2 * pages.channels;
    args.query = static_cast<const uint16_t*>(from->query.data);
    args.query_token_stride = from->query.token_stride, args.query_head_stride = from->query.head_stride;
    args.output = static_cast<uint16_t*>(from->output.data);
    args.output_token_stride = from->output.token_stride, args.output_head_stride = from->output.head_stride;
    args.rows = run.num_tokens * batch.num_heads;
    args.partial = run.workspace;
    if (run.splits > 1) args.levels = run.workspace + run.splits * args.rows * padded_rank(from->rank);
    args.table = batch.block_table, args.table_stride = batch.block_table_stride;
    args.query_starts = batch.query_starts, args.seq_lens = batch.seq_lens;
    args.num_heads = batch.num_heads, args.rank = from->rank, args.splits = run.splits, args.slices = 1;
    args.factor = batch.softmax_scale * 1.44269504f;

    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    const bool bfloat16 = pages.dtype == KVC_BFLOAT16;
    const int64_t most_rows = static_cast<int64_t>(run.max_query_len) * batch.num_heads;
    int error = -KVC_BAD_SHAPE;
    const auto start_with = [&](auto rows, auto tokens, auto wide, int64_t bytes) {
        error = start<rows.value, tokens.value, wide.value>(args, bfloat16, batch.num_requests, run.max_query_len,
                                                            bytes, run.stream);
    };
    const bool narrow = pages.channels <= kNarrowChannels && from->rank <= kSliceChannels;
    int64_t bytes = 0;
    if (narrow && most_rows > 16) bytes = fit<32, 32, false>(args, limit);
    if (bytes) {
        start_with(Number<32>{}, Number<32>{}, Number<false>{}, bytes);
    } else if (narrow && (bytes = fit<16, 32, false>(args, limit))) {
        start_with(Number<16>{}, Number<32>{}, Number<false>{}, bytes);
    } else if ((bytes = fit<16, 16, true>(args, limit))) {
        args.slices = (from->rank + kSliceChannels - 1) / kSliceChannels;
        start_with(Number<16>{}, Number<16>{}, Number<true>{}, bytes);
    }
    if (error || run.splits == 1) return error;
    const Grid rows{static_cast<int>(most_rows), batch.num_requests, 1};
    const int64_t merge_bytes = 4 * (run.splits + 1) / 2 * 2 + 8 * kMergeThreads / 32;
    return bfloat16 ? launch<latent_merge<true>>(rows, kMergeThreads, merge_bytes, run.stream, args)
                    : launch<latent_merge<false>>(rows, kMergeThreads, merge_bytes, run.stream, args);
}

int32_t kvc_cuda_latent_append(const kvc_latent_append_args* from) {
    const kvc_latent_pages& pages = from->pages;
    if (pages.block_size <= 0 || pages.channels <= 0 || from->keys.dtype != pages.dtype) return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    const int entry = is_sixteen_bits(pages.dtype) ? 2 : 4;
    LatentAppendArgs args{};
    args.pages = static_cast<uint8_t*>(pages.data), args.keys = static_cast<const uint8_t*>(from->keys.data);
    args.block_stride = entry * pages.block_stride, args.token_stride = entry * pages.token_stride;
    args.key_stride = entry * from->keys.token_stride;
    args.slots = from->slots, args.num_slots = pages.num_blocks * pages.block_size;
    args.block_size = pages.block_size, args.token_bytes = entry * pages.channels;
    const bool wide = on_16_bytes(args.pages) && on_16_bytes(args.keys) &&
                      (args.block_stride | args.token_stride | args.key_stride | args.token_bytes) % 16 == 0;
    const Grid tokens{static_cast<int>(from->num_tokens), 1, 1};
    return wide ? launch<latent_append<uint4>>(tokens, kAppendThreads, 0, from->run.stream, args)
                : launch<latent_append<uint16_t>>(tokens, kAppendThreads, 0, from->run.stream, args);
}
