// Attention of one layer that shares a latent with others of its group (kvcompress/codec/shared/codec.py).
//
// Tokens of earlier steps are attended as they are stored, those of the running step as they are. Values: the latent is
// mixed for all query heads at once and expanded at the end. Shared keys are of a latent before RoPE, so a query cannot
// be absorbed: it would have to be at every position anew, at head_dim * R products per query head, token and layer.
// Expanding a token's keys costs that once per KV head and serves the whole group and every query of the item, so that
// is what is done: a tile's keys of one KV head, rotated, then ordinary scores.
#pragma once

#include "cpu/core/dense_tile.h"
#include "cpu/core/rope.h"
#include "cpu/core/softmax.h"
#include "cpu/shared/stripes.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {
namespace shared {

struct Scratch {
    float* row;  // a few rows of queries or outputs
    float* query;  // [rows][query_width], or for keys of the layer's own, as integers:
    void* headers;  // IntegerQuery[rows]
    uint8_t* factors;  // [KV heads of the item][quads][rows of a head][digits]
    void* latents;  // keys' latents of a tile: float [positions][tile] or pairs of codes
    float* cosine;  // [head_dim / 2][tile]
    float* sine;
    float* keys;  // [channels or positions][tile], one KV head
    float* gains;  // [stripes or KV heads of the item][tile]
    float* values;  // [tile][value_width], all stripes
    float* exact;  // [tile][exact_width]: the step's own keys or values of one KV head
    float* exact_scores;  // [rows][tile]
    float* scores;  // [rows][tile]: scores, then weights
    float* sums;  // [rows][value_width]
    float* exact_sums;  // [rows][exact_width]: what the step's own tokens add, less the mean
    float* decay;  // [rows]
    float* poison;  // [rows]: NaN for a query that is not finite, else 0
    float* ones;  // [tile]
    int quads;
    int query_width;
    int value_width;
    int exact_width;
};

KVC_INLINE bool keys_shared(const kvc_shared_attend_args& args) { return args.rope_frequency_F != nullptr; }
KVC_INLINE bool in_pairs([[maybe_unused]] const kvc_shared_attend_args& args) {
#if KVC_LEVEL_NUMBER >= 3
    return args.k_codes_blocked != nullptr;
#else
    return false;
#endif
}

// Keys of the layer's own, scored as codes.
KVC_INLINE bool in_integers([[maybe_unused]] const kvc_shared_attend_args& args) {
#if KVC_LEVEL_NUMBER >= 3
    return !keys_shared(args) && args.k[0].side.gain_offset >= 0;
#else
    return false;
#endif
}

inline size_t lay_out(const kvc_shared_attend_args& args, char* base, Scratch& s) {
    Arena arena{base};
    const auto positions = static_cast<size_t>(key_positions(args.k[0].side));
    const auto key_channels = keys_shared(args) ? static_cast<size_t>(args.head_dim) : positions;
    s.query_width = round_up(static_cast<int>(key_channels), 16);
    s.value_width = dense_width(args.num_stripes * args.v[0].side.rank);
    s.exact_width = dense_width(args.head_dim);
    const auto tile = static_cast<size_t>(kTile), rows = static_cast<size_t>(kMaxRows);
    s.row = arena.take<float>(2 * kMatrixRows * kMaxHeadDim);
    s.query = arena.take<float>(rows * static_cast<size_t>(s.query_width));
#if KVC_LEVEL_NUMBER >= 3
    if (in_integers(args)) {
        s.quads = key_quads(args.k[0].side);
        s.headers = arena.take<IntegerQuery>(rows);
        s.factors = arena.take<uint8_t>(rows * kFactorBytes * static_cast<size_t>(s.quads));
    }
#endif
    s.keys = arena.take<float>(tile * key_channels);
    if (keys_shared(args)) {
        s.latents = arena.take<float>(tile * positions * static_cast<size_t>(args.num_k));
        s.cosine = arena.take<float>(tile * key_channels / 2);
        s.sine = arena.take<float>(tile * key_channels / 2);
    }
    s.gains = arena.take<float>(tile * static_cast<size_t>(keys_shared(args) ? args.num_k : kMaxRows));
    s.values = arena.take<float>(tile * static_cast<size_t>(s.value_width));
    s.exact = arena.take<float>(tile * static_cast<size_t>(s.exact_width));
    s.exact_scores = arena.take<float>(rows * tile);
    s.scores = arena.take<float>(rows * tile);
    s.sums = arena.take<float>(rows * static_cast<size_t>(s.value_width));
    s.exact_sums = arena.take<float>(rows * static_cast<size_t>(s.exact_width));
    s.decay = arena.take<float>(rows);
    s.poison = arena.take<float>(rows);
    s.ones = arena.take<float>(tile);
    return arena.used;
}

size_t scratch_bytes(const kvc_shared_attend_args& args) {
    Scratch unused{};
    return lay_out(args, nullptr, unused);
}

KVC_INLINE int value_rank(const kvc_shared_attend_args& args) { return args.num_stripes * args.v[0].side.rank; }

// A row's unnormalised values: the mixed latent, then what exact tokens add to the output.
int width(const kvc_shared_attend_args& args) { return value_rank(args) + args.head_dim; }

KVC_INLINE int64_t query_token(const kvc_shared_attend_args& args, const Item& item, int row) {
    return args.batch.query_starts[item.request] + item.first_token + row % item.rows_per_head() / item.group;
}
KVC_INLINE int query_head(const kvc_shared_attend_args& args, const Item& item, int row) {
    const int head = item.kv_head + row / item.rows_per_head();
    return head * (args.batch.num_heads / args.num_kv_heads) + item.first_group + row % item.group;
}

inline void read_queries(const kvc_shared_attend_args& args, const Item& item, const Scratch& s) {
    const int head_dim = args.head_dim;
    for (int row = 0; row < item.rows(); ++row) {
        float *query = s.row, *target = s.query + row * s.query_width;
        convert_row(row_at(args.query, query_token(args, item, row), query_head(args, item, row)), args.query.dtype,
                    head_dim, query);
        s.poison[row] = 0;
        for (int d = 0; d < head_dim; ++d) {
            query[d] *= args.batch.softmax_scale;
            s.poison[row] += query[d] * 0.f;
        }
        std::memset(target, 0, sizeof(float) * static_cast<size_t>(s.query_width));
        if (keys_shared(args)) {
            std::memcpy(target, query, sizeof(float) * static_cast<size_t>(head_dim));
        } else {
            const kvc_side& side = args.k[0].side;
            const int head = item.kv_head + row / item.rows_per_head();
            float* absorbed = s.row + kMaxHeadDim;
            rows_times_matrix(query, 1, 0, args.k_decode_HDR + static_cast<int64_t>(head) * head_dim * side.rank,
                              head_dim, side.rank, absorbed, 0);
#if KVC_LEVEL_NUMBER >= 3
            if (in_integers(args)) {
                const int per_head = item.rows_per_head(), first = row / per_head * per_head;
                uint8_t* factors = s.factors + (first * s.quads + row % per_head) * kFactorBytes;
                integer_query(side, absorbed, s.quads, static_cast<IntegerQuery*>(s.headers)[row], factors,
                              per_head * kFactorBytes);
                continue;
            }
#endif
            key_query(side, absorbed, target);
        }
    }
}

// The latents of a tile's keys, and its rotations.
inline void read_latents(const kvc_shared_attend_args& args, const Item& item, int start, int tokens,
                         const Scratch& s) {
    const int positions = key_positions(args.k[0].side);
    rope_tables(args.rope_frequency_F, args.head_dim / 2, args.rope_amplitude, start, s.cosine, s.sine);
    for (int stripe = 0; stripe < args.num_k; ++stripe) {
        float* gains = s.gains + stripe * kTile;
#if KVC_LEVEL_NUMBER >= 3
        if (in_pairs(args)) {
            read_tile_pairs(args.k[stripe], item.request, start, tokens,
                            static_cast<uint8_t*>(s.latents) + 2 * stripe * positions * kTile, gains);
            continue;
        }
#endif
        float* latent = static_cast<float*>(s.latents) + stripe * positions * kTile;
        read_tile_transposed(args.k[stripe], item.request, 0, start, tokens, latent, gains);
        if (args.k[stripe].side.gain_offset < 0) continue;
        for (int i = 0; i < positions * kTile; i += kLanes)
            store(latent + i, load(latent + i) * load(gains + i % kTile));
    }
}

// Keys of one KV head from the tile's latents.
inline void expand_keys(const kvc_shared_attend_args& args, int head, int tokens, const Scratch& s) {
    const int head_dim = args.head_dim, positions = args.num_k * key_positions(args.k[0].side);
    for (int d = 0; d < head_dim; d += 8) {
        const int64_t channel = static_cast<int64_t>(head) * head_dim + d;
        float* out = s.keys + d * kTile;
#if KVC_LEVEL_NUMBER >= 3
        if (in_pairs(args)) {
            expand_block_pairs(static_cast<uint8_t*>(s.latents), args.k_codes_blocked + channel * positions, args.num_k,
                               positions / args.num_k / 2, s.gains, args.k_scale_HD + channel, args.k_mean_HD + channel,
                               tokens, out);
            continue;
        }
#endif
        expand_block(static_cast<float*>(s.latents), args.k_decode_blocked + channel * positions, positions,
                     args.k_mean_HD + channel, tokens, out);
    }
    rotate_tile(s.keys, head_dim, s.cosine, s.sine);
}

// One KV head's keys or values of tokens of the running step.
inline void read_exact(const kvc_shared_attend_args& args, const kvc_rows& source, const Item& item, int head,
                       int token, int count, const Scratch& s) {
    const int32_t* rows =
        args.exact.rows + args.exact.starts[item.request] + token - args.exact.stored_lens[item.request];
    for (int i = 0; i < count; ++i)
        convert_row(row_at(source, rows[i], head), source.dtype, args.head_dim, s.exact + i * s.exact_width);
}

// Scores of the item's KV head `i` with keys of the layer's own, in units of the keys' gains.
inline void score_own_keys(const kvc_shared_attend_args& args, const Item& item, int i, int start, int tokens,
                           const Scratch& s) {
    const kvc_shared_records& records = args.k[0];
    const int head = item.kv_head + i, rows = item.rows_per_head();
    float *gains = s.gains + i * kTile, *scores = s.scores + i * rows * kTile;
#if KVC_LEVEL_NUMBER >= 3
    if (in_integers(args)) {
        kvc_side side = records.side;
        side.code_bytes = records.token_bytes;  // from token to token
        auto* keys = reinterpret_cast<uint8_t*>(s.keys);
        for (int group = 0; group < tokens; group += kGroup) {
            const uint8_t* stored = stored_tokens(records, item.request, head, start + group);
            stored_gains(records, stored, min_of(tokens - group, kGroup), gains + group);
            unpack_keys_integer(side, stored + side.code_offset, keys + group / kGroup * s.quads * 64);
        }
        const uint8_t* factors = s.factors + i * rows * s.quads * kFactorBytes;
        score_tile_integer(static_cast<IntegerQuery*>(s.headers) + i * rows, factors, rows, keys, s.quads, scores,
                           Ahead{keys, keys});
        return;
    }
#endif
    read_tile_transposed(records, item.request, head, start, tokens, s.keys, gains);
    score_tile(s.query + i * rows * s.query_width, s.query_width, rows, s.keys, key_positions(records.side), tokens,
               scores);
}

inline void attend_tile(const kvc_shared_attend_args& args, const Item& item, int start, int tokens,
                        const Partial& partial, const Scratch& s) {
    const int head_dim = args.head_dim, rows = item.rows(), per_head = item.rows_per_head();
    const int left = args.exact.stored_lens[item.request] - start;
    const int stored = left < 0 ? 0 : min_of(left, tokens), exact = tokens - stored;
    if (keys_shared(args) && stored) read_latents(args, item, start, stored, s);
    for (int i = 0; i < item.kv_heads; ++i) {
        const int head = item.kv_head + i;
        const float* query = s.query + i * per_head * s.query_width;
        float* scores = s.scores + i * per_head * kTile;
        if (!keys_shared(args)) {
            score_own_keys(args, item, i, start, tokens, s);
            continue;
        }
        if (stored) {
            expand_keys(args, head, stored, s);
            score_tile(query, s.query_width, per_head, s.keys, head_dim, stored, scores);
        }
        if (!exact) continue;
        read_exact(args, args.exact.keys, item, head, start + stored, exact, s);
        for (int group = 0; group < exact; group += kGroup)
            score_group_dense(query, s.query_width, per_head, s.exact + group * s.exact_width, s.exact_width,
                              round_up(head_dim, 16), s.exact_scores + group);
        for (int row = 0; row < per_head; ++row)
            std::memcpy(scores + row * kTile + stored, s.exact_scores + row * kTile,
                        sizeof(float) * static_cast<size_t>(exact));
    }
    const int queries = args.batch.query_starts[item.request + 1] - args.batch.query_starts[item.request];
    const int before = args.batch.seq_lens[item.request] - queries + item.first_token;
    for (int row = 0; row < rows; ++row) {
        float largest, weight_sum;
        const int seen = min_of(before + row % per_head / item.group + 1 - start, tokens);
        const float* gains = keys_shared(args) ? s.ones : s.gains + row / per_head * kTile;
        s.decay[row] = soften(s.scores + row * kTile, gains, s.ones, seen, partial.max[row], partial.sum[row], largest,
                              weight_sum);
    }
    // Stripe by stripe: what is written behind one is the start of the next.
    for (int stripe = 0; stripe < args.num_stripes; ++stripe)
        for (int token = 0; token < stored; ++token) {
            const uint8_t* bytes = stored_tokens(args.v[stripe], item.request, 0, start + token);
            read_value(args.v[stripe], bytes, s.values + token * s.value_width + stripe * args.v[0].side.rank);
        }
    mix_dense(s.scores, s.decay, rows, s.values, s.value_width, stored, value_rank(args), s.sums, s.value_width);
    // Exact tokens come last: until then their sums are zero and need no decay.
    for (int i = 0; exact && i < item.kv_heads; ++i) {
        const int head = item.kv_head + i;
        read_exact(args, args.exact.values, item, head, start + stored, exact, s);
        for (int token = 0; token < exact; ++token)
            for (int d = 0; d < head_dim; ++d)
                s.exact[token * s.exact_width + d] -= args.v_mean_HD[head * head_dim + d];
        mix_dense(s.scores + i * per_head * kTile + stored, s.decay + i * per_head, per_head, s.exact, s.exact_width,
                  exact, head_dim, s.exact_sums + i * per_head * s.exact_width, s.exact_width);
    }
}

void attend(const kvc_shared_attend_args& args, const Item& item, int start, int stop, const Partial& partial,
            void* scratch) {
    Scratch s{};
    lay_out(args, static_cast<char*>(scratch), s);
    const int rows = item.rows();
    for (int i = 0; i < kTile; ++i) s.ones[i] = 1;
    for (int row = 0; row < rows; ++row) {
        partial.max[row] = -__builtin_inff();
        partial.sum[row] = 0;
    }
    std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(rows * s.value_width));
    std::memset(s.exact_sums, 0, sizeof(float) * static_cast<size_t>(rows * s.exact_width));
    read_queries(args, item, s);
    for (int tile = start; tile < stop; tile += kTile)
        attend_tile(args, item, tile, min_of(stop - tile, kTile), partial, s);
    for (int row = 0; row < rows; ++row) {
        partial.sum[row] += s.poison[row];  // the softmax's comparisons would hide it
        float* latent = partial.latent + row * width(args);
        std::memcpy(latent, s.sums + row * s.value_width, sizeof(float) * static_cast<size_t>(value_rank(args)));
        std::memcpy(latent + value_rank(args), s.exact_sums + row * s.exact_width,
                    sizeof(float) * static_cast<size_t>(args.head_dim));
    }
}

void merge(const kvc_shared_attend_args& args, const Item& item, const Partial& into, const Partial& from) {
    merge_rows(item.rows(), width(args), into, from);
}

void finish(const kvc_shared_attend_args& args, const Item& item, const Partial& partial, void* scratch) {
    Scratch s{};
    lay_out(args, static_cast<char*>(scratch), s);
    const int rank = value_rank(args), head_dim = args.head_dim, stride = width(args), per_head = item.rows_per_head();
    for (int row = 0; row < item.rows(); ++row)
        for (int c = 0; c < stride; ++c) partial.latent[row * stride + c] /= partial.sum[row];
    for (int i = 0; i < item.kv_heads; ++i) {
        const int head = item.kv_head + i;
        const float* decode = args.v_decode_HRD + static_cast<int64_t>(head) * rank * head_dim;
        for (int first = 0; first < per_head; first += kMatrixRows) {
            const int count = min_of(per_head - first, kMatrixRows);
            const float* latents = partial.latent + (i * per_head + first) * stride;
            rows_times_matrix(latents, count, stride, decode, rank, head_dim, s.row, kMaxHeadDim);
            for (int n = 0; n < count; ++n) {
                const int row = i * per_head + first + n;
                float* out = s.row + n * kMaxHeadDim;
                for (int d = 0; d < head_dim; ++d)
                    out[d] += latents[n * stride + rank + d] + args.v_mean_HD[head * head_dim + d];
                store_row(args.output, query_token(args, item, row), query_head(args, item, row), head_dim, out);
            }
        }
    }
}

}  // namespace shared
}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
