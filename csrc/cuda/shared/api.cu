// Attention of layers that share a latent: the C interface, choice of instance and of shared memory.
#include "cuda/core/absorbed.h"
#include "cuda/shared/exact.h"
#include "cuda/shared/make_record.h"
#include "cuda/shared/own_scores.h"
#include "cuda/shared/scores.h"

namespace kvcompress::cuda {
namespace {

struct Problem {
    const kvc_shared_cuda_attend_args* from;
    Record k, v;
    Stripe k_stripes[kMaxStripes], v_stripes[kMaxStripes];
    StepRows step;
    int64_t shared_limit;
    int group, rank;
};

bool make_problem(const kvc_shared_cuda_attend_args& from, Problem& problem) {
    problem.from = &from;
    const int heads = from.batch.num_heads, kv_heads = from.num_kv_heads;
    if (from.num_stripes < 1 || from.num_stripes > kMaxStripes || from.num_k != (from.k_decode ? from.num_stripes : 1))
        return false;
    if (kv_heads <= 0 || heads <= 0 || heads % kv_heads || from.head_dim <= 0 || from.head_dim > kMostChannels ||
        from.head_dim % 2)
        return false;
    if (from.score_splits < 1 || from.run.splits < 1 || from.requests_at_once < 1 || from.score_stride % kMixTokens)
        return false;
    if (!make_record(from.k[0], problem.k) || !make_record(from.v[0], problem.v)) return false;
    for (int stripe = 0; stripe < from.num_k; ++stripe)
        if (!make_stripe(from.k[stripe], problem.k_stripes[stripe])) return false;
    for (int stripe = 0; stripe < from.num_stripes; ++stripe)
        if (!make_stripe(from.v[stripe], problem.v_stripes[stripe])) return false;
    if (from.k_decode) {
        if ((from.k_channels != 64 && from.k_channels != 128 && from.k_channels != 256) ||
            from.head_dim > from.k_channels)
            return false;
    } else if (from.k_channels != kTileChannels * problem.k.num_tiles || from.k[0].records != kv_heads) {
        return false;
    }
    problem.step = {from.exact.stored_lens, from.exact.rows, from.exact.starts};
    problem.group = heads / kv_heads, problem.rank = from.num_stripes * problem.v.rank;
    return true;
}

// Row tiles are of all query rows of a KV head, or as many as a block has.
void choose_rows(const Problem& problem, ScoreArgs& args, int most) {
    const int tiles = (problem.from->run.max_query_len * problem.group + kRows - 1) / kRows;
    args.row_tiles = tiles < most ? tiles : most;
    args.row_groups = (tiles + args.row_tiles - 1) / args.row_tiles;
}

ScoreArgs score_args(const Problem& problem, int first_request) {
    const kvc_shared_cuda_attend_args& from = *problem.from;
    ScoreArgs args{};
    args.record = problem.k;
    for (int stripe = 0; stripe < from.num_k; ++stripe) args.stripes[stripe] = problem.k_stripes[stripe];
    args.num_stripes = from.num_k;
    args.query = token_rows(from.query);
    args.scores = from.scores, args.score_stride = from.score_stride;
    args.query_starts = from.batch.query_starts, args.seq_lens = from.batch.seq_lens;
    args.first_request = first_request, args.max_queries = from.run.max_query_len;
    args.num_heads = from.batch.num_heads, args.group = problem.group;
    choose_rows(problem, args, kMostRowTiles);
    args.softmax_scale = from.batch.softmax_scale;
    return args;
}

Grid score_grid(const Problem& problem, const ScoreArgs& args, int requests) {
    return {problem.from->score_splits, problem.from->num_kv_heads * args.row_groups, requests};
}

void lay_out_rows(ScoreArgs& args, Arena& arena, int channels) {
    args.query_at = arena.take(2 * kRows * args.row_tiles * channels);
    args.factor_at = arena.take(4 * kRows * args.row_tiles);
    args.target_at = arena.take(8 * kRows * args.row_tiles);
}

template <int WIDTH>
int start_shared(const Problem& problem, int first_request, int requests) {
    const kvc_shared_cuda_attend_args& from = *problem.from;
    SharedScoreArgs args{};
    args.rows = score_args(problem, first_request);
    args.decode = static_cast<const uint8_t*>(from.k_decode), args.decode_unit = from.k_decode_unit;
    args.mean = from.k_mean, args.frequency = from.rope_frequency, args.amplitude = from.rope_amplitude;
    args.head_dim = from.head_dim;
    const int all = slices_of(problem.k) * from.num_k;
    const auto lay_out = [&](int warps, int slots) {
        Arena arena;
        lay_out_rows(args.rows, arena, WIDTH);
        args.mean_at = arena.take(4 * WIDTH);
        args.frequency_at = arena.take(2 * WIDTH);
        args.decode_slots = slots;
        args.decode_at = arena.take(static_cast<int64_t>(slots) * kSliceTiles * 2 * kTileChannels * WIDTH);
        args.codes_at =
            arena.take(static_cast<int64_t>(warps) * 2 * warp_tokens<WIDTH>() * problem.k.token_bytes + kReadBeyond);
        return arena.used;
    };
    // Many tokens share a decoder on its way; then, if there is room, it makes that way only once.
    int warps = kScoreThreads / 32;
    const int two = all < 2 ? all : 2;
    while (warps > 1 && lay_out(warps, two) > problem.shared_limit) warps /= 2;
    while (args.rows.row_tiles > 1 && lay_out(warps, two) > problem.shared_limit)
        choose_rows(problem, args.rows, args.rows.row_tiles / 2);
    int64_t bytes = lay_out(warps, all);
    if (bytes > problem.shared_limit) bytes = lay_out(warps, two);
    if (bytes > problem.shared_limit) return -KVC_BAD_SHAPE;
    return launch<score_shared<WIDTH>>(score_grid(problem, args.rows, requests), 32 * warps, bytes, from.run.stream,
                                       args);
}

int start_own(const Problem& problem, int first_request, int requests) {
    const kvc_shared_cuda_attend_args& from = *problem.from;
    OwnScoreArgs args{};
    args.rows = score_args(problem, first_request);
    int warps = kMaxThreads / 32;
    const auto lay_out = [&] {
        Arena arena;
        lay_out_rows(args.rows, arena, from.k_channels);
        args.codes_at = arena.take(static_cast<int64_t>(warps) * 2 * kRun * problem.k.token_bytes + kReadBeyond);
        return arena.used;
    };
    while (warps > 1 && lay_out() > problem.shared_limit) warps /= 2;
    const int64_t bytes = lay_out();
    if (bytes > problem.shared_limit) return -KVC_BAD_SHAPE;
    return launch<score_own>(score_grid(problem, args.rows, requests), 32 * warps, bytes, from.run.stream, args);
}

int start_scores(const Problem& problem, int first_request, int requests) {
    if (!problem.from->k_decode) return start_own(problem, first_request, requests);
    switch (problem.from->k_channels) {
        case 64: return start_shared<64>(problem, first_request, requests);
        case 128: return start_shared<128>(problem, first_request, requests);
        default: return start_shared<256>(problem, first_request, requests);
    }
}

int start_mix(const Problem& problem, int first_request, int requests) {
    const kvc_shared_cuda_attend_args& from = *problem.from;
    MixArgs args{};
    args.record = problem.v;
    for (int stripe = 0; stripe < from.num_stripes; ++stripe) args.stripes[stripe] = problem.v_stripes[stripe];
    args.step = problem.step;
    args.scores = from.scores, args.score_stride = from.score_stride;
    args.rows = from.run.num_tokens * from.batch.num_heads;
    set_output(from.batch, from.run, problem.rank, from.mixed_THR, from.mixed_lse_TH, args.output, args.lse);
    args.query_starts = from.batch.query_starts, args.seq_lens = from.batch.seq_lens;
    args.first_request = first_request, args.max_queries = from.run.max_query_len;
    args.num_heads = from.batch.num_heads, args.num_stripes = from.num_stripes;
    constexpr int kBlockTiles = kMixTiles * kMixWarps;
    args.channel_blocks = (problem.v.num_tiles + kBlockTiles - 1) / kBlockTiles;
    Arena arena;
    args.weights_at = arena.take(8 * 32 * kRowTiles * kMixWarps);
    args.kept_at = arena.take(kMixTokens);
    args.rows_at = arena.take(4 * kMixRows);
    const int64_t codes = static_cast<int64_t>(kMixTokens) * problem.v.token_bytes;
    args.code_places = arena.used + 2 * codes + kReadBeyond <= problem.shared_limit ? 2 : 1;
    args.codes_at = arena.take(args.code_places * codes + kReadBeyond);
    if (arena.used > problem.shared_limit) return -KVC_BAD_SHAPE;
    const int row_groups = (from.run.max_query_len * from.batch.num_heads + kMixRows - 1) / kMixRows;
    const Grid grid{from.run.splits, row_groups * from.num_stripes * args.channel_blocks, requests};
    return launch<mix_shared>(grid, 32 * kMixWarps, arena.used, from.run.stream, args);
}

int start_exact(const Problem& problem, int first_request, int requests) {
    const kvc_shared_cuda_attend_args& from = *problem.from;
    ExactArgs args{};
    args.step = problem.step;
    args.query = token_rows(from.query), args.keys = token_rows(from.exact.keys),
    args.values = token_rows(from.exact.values);
    args.scores = from.k_decode ? nullptr : from.scores, args.score_stride = from.score_stride;
    args.output = from.exact_THD, args.lse = from.exact_lse_TH;
    args.query_starts = from.batch.query_starts, args.seq_lens = from.batch.seq_lens;
    args.first_request = first_request, args.max_queries = from.run.max_query_len;
    args.num_heads = from.batch.num_heads, args.group = problem.group, args.head_dim = from.head_dim;
    args.softmax_scale = from.batch.softmax_scale;
    const Grid grid{from.run.max_query_len * problem.group, from.num_kv_heads, requests};
    return launch<attend_exact>(grid, kMaxThreads, 4 * kMaxThreads, from.run.stream, args);
}

}  // namespace
}  // namespace kvcompress::cuda

using namespace kvcompress::cuda;

int32_t kvc_cuda_shared_attend(const kvc_shared_cuda_attend_args* from) {
    Problem problem{};
    if (!make_problem(*from, problem)) return -KVC_BAD_SHAPE;
    if (from->batch.num_requests == 0 || from->run.max_query_len == 0) return KVC_OK;
    if (const int error = shared_limit(problem.shared_limit)) return error;
    // One stream: scores of one part of the requests are read before those of the next overwrite them.
    for (int first = 0; first < from->batch.num_requests; first += from->requests_at_once) {
        const int left = from->batch.num_requests - first,
                  requests = left < from->requests_at_once ? left : from->requests_at_once;
        for (const auto start : {start_scores, start_mix, start_exact})
            if (const int error = start(problem, first, requests)) return error;
    }
    return start_combine(from->batch, from->run, from->num_kv_heads, problem.rank, from->mixed_THR, from->mixed_lse_TH);
}
