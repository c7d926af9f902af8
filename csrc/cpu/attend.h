// Attention of one item: rows of one KV head over a range of tokens, in their stored form.
//
// Keys, absorbed: score = gain * sum_c (query @ decode^T)_c * step_c * code value_c (query . mean is the same for every
// key of a row and cancels in the softmax). Values: sum_t p_t gain_t code value_tc in latent space for all rows at once,
// steps, decoder and mean once at the end.
#pragma once

#include "float_side.h"
#include "integer_side.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

KVC_INLINE bool in_integers(const kvc_side& side) {
#if KVC_LEVEL_NUMBER >= 3
    return side.gain_offset >= 0;
#else
    (void)side;
    return false;
#endif
}

// Where each thread's temporary arrays start.
struct Scratch {
    float* row;         // one query, mean or output row, and its latent
    float* query;       // [rows][key positions] float32 queries, or:
    uint8_t* factors;   // [quads][rows][digits]
    void* headers;      // IntegerQuery[rows]
    void* keys;         // unpacked tile
    void* values;       // unpacked tile
    float* scores;      // [rows][tile]: scores, then weights
    uint8_t* weights;   // [tile / 4][rows][digits]
    float* sums;        // [rows][value positions]
    float* decay;       // [rows]
    void* tile_weights; // TileWeights[rows]
    int key_width;      // positions or quads
    int value_width;
};

struct Arena {
    char* base;
    size_t used = 0;
    template <typename T>
    T* take(size_t count) {
        T* start = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
        return start;
    }
};

inline size_t lay_out(const kvc_pages& pages, char* base, Scratch& s) {
    Arena arena{base};
    s.row = arena.take<float>(4 * kMaxHeadDim);
    s.scores = arena.take<float>(kMaxRows * kTile);
    s.decay = arena.take<float>(kMaxRows);
    s.key_width = key_positions(pages.k);
    s.value_width = float_positions(pages.v);
#if KVC_LEVEL_NUMBER >= 3
    if (in_integers(pages.k)) {
        s.key_width = key_quads(pages.k);
        s.factors = arena.take<uint8_t>(static_cast<size_t>(kMaxRows * kFactorBytes * s.key_width));
        s.headers = arena.take<IntegerQuery>(kMaxRows);
        s.keys = arena.take<uint8_t>(static_cast<size_t>(kTile * 4 * s.key_width));
    }
    if (in_integers(pages.v)) {
        s.value_width = value_positions(pages.v);
        s.values = arena.take<uint8_t>(static_cast<size_t>(kTile * s.value_width));
        s.weights = arena.take<uint8_t>(kMaxRows * kFactorBytes * kTile / 4);
        s.tile_weights = arena.take<TileWeights>(kMaxRows);
    }
#endif
    if (!in_integers(pages.k)) {
        s.query = arena.take<float>(static_cast<size_t>(kMaxRows * s.key_width));
        s.keys = arena.take<float>(static_cast<size_t>(kTile * s.key_width));
    }
    if (!in_integers(pages.v)) s.values = arena.take<float>(static_cast<size_t>(kTile * s.value_width));
    s.sums = arena.take<float>(static_cast<size_t>(kMaxRows * s.value_width));
    return arena.used;
}

size_t attend_scratch_bytes(const kvc_attend_args& args) {
    Scratch unused{};
    return lay_out(args.pages, nullptr, unused);
}

KVC_INLINE int64_t query_token(const kvc_attend_args& args, const Item& item, int row) {
    return args.query_starts[item.request] + item.first_token + row / item.group;
}
KVC_INLINE int query_head(const kvc_attend_args& args, const Item& item, int row) {
    return item.kv_head * (args.num_heads / args.pages.num_kv_heads) + item.first_group + row % item.group;
}
// Tokens a row sees: those up to its own.
KVC_INLINE int visible(const kvc_attend_args& args, const Item& item, int row) {
    const int queries = args.query_starts[item.request + 1] - args.query_starts[item.request];
    return args.seq_lens[item.request] - queries + item.first_token + row / item.group + 1;
}

inline void absorb_queries(const kvc_attend_args& args, const Item& item, int rows, Scratch& s) {
    const kvc_side& side = args.pages.k;
    const int head_dim = args.pages.head_dim;
    const float* decode = args.k_decode_HDR + static_cast<int64_t>(item.kv_head) * head_dim * side.rank;
    float *query = s.row, *absorbed = s.row + kMaxHeadDim;
    for (int row = 0; row < rows; ++row) {
        load_row(args.query, query_token(args, item, row), query_head(args, item, row), head_dim, query);
        for (int d = 0; d < head_dim; ++d) query[d] *= args.softmax_scale;
        row_times_matrix(query, decode, head_dim, side.rank, absorbed);
#if KVC_LEVEL_NUMBER >= 3
        if (in_integers(side)) {
            integer_query(side, absorbed, s.key_width, static_cast<IntegerQuery*>(s.headers)[row],
                          s.factors + row * kFactorBytes, rows * kFactorBytes);
            continue;
        }
#endif
        key_query(side, absorbed, s.query + row * s.key_width);
    }
}

// Sixteen tokens' gains; those past `tokens` are 0, whatever their bytes are.
KVC_INLINE void read_gains(const kvc_side& side, const uint8_t* record, int offset, int tokens, float* gains) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    alignas(kAlign) uint16_t halves[kGroup];
    if (side.gain_offset < 0)
        for (int i = 0; i < kGroup; ++i) halves[i] = 0x3c00;  // 1
    else
        std::memcpy(halves, record + side.gain_offset + 2 * offset, sizeof halves);
    for (int i = tokens; i < kGroup; ++i) halves[i] = 0;
    for (int i = 0; i < kGroup; i += kLanes) {
        Halves narrow;
        std::memcpy(&narrow, halves + i, sizeof narrow);
        store(gains + i, half_to_float(__builtin_convertvector(narrow, VecU)));
    }
}

KVC_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// A tile's tokens, unpacked. Slots past `tokens` hold anything but have gain 0 and, in float32 values, zeros.
inline void unpack_tile(const kvc_attend_args& args, const Item& item, int start, int tokens, int stop, Scratch& s, float* k_gain, float* v_gain) {
    const kvc_pages& pages = args.pages;
    const int32_t* blocks = args.block_table + item.request * args.block_table_stride;
    const auto record_of = [&](int token) {
        return pages.data + blocks[token / pages.block_size] * pages.block_stride + item.kv_head * pages.head_stride;
    };
    for (int group = 0; group * kGroup < tokens; ++group) {
        const int first = start + group * kGroup, offset = first % pages.block_size;
        const int count = min_of(tokens - group * kGroup, kGroup);
        const uint8_t* record = record_of(first);
        const uint8_t* k_codes = record + pages.k.code_offset + offset * pages.k.code_bytes;
        const uint8_t* v_codes = record + pages.v.code_offset + offset * pages.v.code_bytes;
        if (first + kTile < stop) {
            const int ahead = first + kTile, ahead_offset = ahead % pages.block_size;
            const uint8_t* next = record_of(ahead);
            prefetch(next + pages.k.code_offset + ahead_offset * pages.k.code_bytes, kGroup * pages.k.code_bytes);
            prefetch(next + pages.v.code_offset + ahead_offset * pages.v.code_bytes, kGroup * pages.v.code_bytes);
        }
        read_gains(pages.k, record, offset, count, k_gain + group * kGroup);
        read_gains(pages.v, record, offset, count, v_gain + group * kGroup);
#if KVC_LEVEL_NUMBER >= 3
        if (in_integers(pages.k))
            unpack_keys_integer(pages.k, k_codes, static_cast<uint8_t*>(s.keys) + group * s.key_width * 64);
        if (in_integers(pages.v))
            for (int quad = 0; 4 * quad < count; ++quad)
                unpack_values_integer(pages.v, v_codes + 4 * quad * pages.v.code_bytes,
                                      static_cast<uint8_t*>(s.values) + (4 * group + quad) * 4 * s.value_width);
#endif
        if (!in_integers(pages.k)) unpack_keys(pages.k, k_codes, static_cast<float*>(s.keys) + group * kGroup);
        if (!in_integers(pages.v))
            for (int i = 0; i < count; ++i)
                unpack_value(pages.v, v_codes + i * pages.v.code_bytes, static_cast<float*>(s.values) + (group * kGroup + i) * s.value_width);
    }
}

// Scores of a row to weights p * gain; returns what the row's earlier sums must be multiplied by.
inline float soften(float* scores, const float* k_gain, const float* v_gain, int seen, float& row_max, float& row_sum, float& largest, float& weight_sum) {
    largest = weight_sum = 0;
    if (seen <= 0) {
        std::memset(scores, 0, sizeof(float) * kTile);
        return 1.f;
    }
    alignas(kAlign) int32_t index[kTile];
    for (int i = 0; i < kTile; ++i) index[i] = i;
    const VecF hidden = splat(-__builtin_inff());
    VecF max = hidden;
    for (int i = 0; i < kTile; i += kLanes) {
        VecI lane;
        std::memcpy(&lane, index + i, sizeof lane);
        // A select, not a product: slots past the end may hold anything.
        const VecF score = lane < seen ? load(scores + i) * load(k_gain + i) : hidden;
        store(scores + i, score);
        max = max_of(score, max);
    }
    const float new_max = [&] {
        const float tile_max = max_lane(max);
        return tile_max > row_max ? tile_max : row_max;
    }();
    alignas(kAlign) float difference[kLanes];
    store(difference, exp_nonpositive(splat(row_max - new_max)));
    const float decay = row_max == new_max ? 1.f : difference[0];
    VecF total = {}, weights = {}, top = {};
    for (int i = 0; i < kTile; i += kLanes) {
        const VecF p = exp_nonpositive(load(scores + i) - new_max);
        const VecF weight = p * load(v_gain + i);
        total += p;
        weights += weight;
        top = max_of(weight, top);
        store(scores + i, weight);
    }
    row_max = new_max;
    row_sum = row_sum * decay + sum(total);
    largest = max_lane(top);
    weight_sum = sum(weights);
    return decay;
}

inline void attend_tile(const kvc_attend_args& args, const Item& item, int start, int tokens, int stop, int rows, const Partial& partial, Scratch& s) {
    const kvc_pages& pages = args.pages;
    alignas(kAlign) float k_gain[kTile] = {}, v_gain[kTile] = {};
    unpack_tile(args, item, start, tokens, stop, s, k_gain, v_gain);
#if KVC_LEVEL_NUMBER >= 3
    if (in_integers(pages.k))
        score_tile_integer(static_cast<IntegerQuery*>(s.headers), s.factors, rows, static_cast<uint8_t*>(s.keys), s.key_width, s.scores);
#endif
    if (!in_integers(pages.k))
        score_tile(s.query, s.key_width, rows, static_cast<float*>(s.keys), s.key_width, tokens, s.scores);
    for (int row = 0; row < rows; ++row) {
        float largest, weight_sum;
        const int seen = min_of(visible(args, item, row) - start, tokens);
        s.decay[row] = soften(s.scores + row * kTile, k_gain, v_gain, seen, partial.max[row], partial.sum[row], largest, weight_sum);
#if KVC_LEVEL_NUMBER >= 3
        if (in_integers(pages.v)) {
            const float scale = integer_weights(s.scores + row * kTile, largest, s.weights + row * kFactorBytes, rows * kFactorBytes);
            static_cast<TileWeights*>(s.tile_weights)[row] = {s.decay[row], scale, 0.5f * weight_sum};
        }
#endif
    }
#if KVC_LEVEL_NUMBER >= 3
    if (in_integers(pages.v))
        mix_tile_integer(static_cast<TileWeights*>(s.tile_weights), s.weights, rows, static_cast<uint8_t*>(s.values), (tokens + 3) / 4, s.value_width, s.sums);
#endif
    if (!in_integers(pages.v))
        mix_tile(s.scores, s.decay, rows, static_cast<float*>(s.values), tokens, s.value_width, s.sums);
}

void attend(const kvc_attend_args& args, const Item& item, int start, int stop, const Partial& partial, void* scratch) {
    Scratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const int rows = item.tokens * item.group;
    for (int row = 0; row < rows; ++row) {
        partial.max[row] = -__builtin_inff();
        partial.sum[row] = 0;
    }
    std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(rows * s.value_width));
    absorb_queries(args, item, rows, s);
    for (int tile = start; tile < stop; tile += kTile)
        attend_tile(args, item, tile, min_of(stop - tile, kTile), stop, rows, partial, s);
    for (int row = 0; row < rows; ++row) {
        const float* sums = s.sums + row * s.value_width;
        float* latent = partial.latent + row * args.pages.v.rank;
#if KVC_LEVEL_NUMBER >= 3
        if (in_integers(args.pages.v)) {
            value_channels_integer(args.pages.v, sums, latent);
            continue;
        }
#endif
        value_channels(args.pages.v, sums, latent);
    }
}

void merge(const kvc_attend_args& args, const Item& item, const Partial& into, const Partial& from) {
    const int rank = args.pages.v.rank;
    for (int row = 0; row < item.tokens * item.group; ++row) {
        if (from.sum[row] == 0) continue;  // none of these tokens is visible to the row
        const float max = into.max[row] > from.max[row] ? into.max[row] : from.max[row];
        alignas(kAlign) float ours[kLanes], theirs[kLanes];
        store(ours, exp_nonpositive(splat(into.max[row] - max)));
        store(theirs, exp_nonpositive(splat(from.max[row] - max)));
        into.max[row] = max;
        into.sum[row] = into.sum[row] * ours[0] + from.sum[row] * theirs[0];
        for (int c = 0; c < rank; ++c)
            into.latent[row * rank + c] = into.latent[row * rank + c] * ours[0] + from.latent[row * rank + c] * theirs[0];
    }
}

void finish(const kvc_attend_args& args, const Item& item, const Partial& partial, void* scratch) {
    Scratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const int rank = args.pages.v.rank, head_dim = args.pages.head_dim;
    const float* decode = args.v_decode_HRD + static_cast<int64_t>(item.kv_head) * rank * head_dim;
    const float* v_mean = args.v_mean_HD + item.kv_head * head_dim;
    const float* k_mean = args.k_mean_HD + item.kv_head * head_dim;
    float* out = s.row;
    for (int row = 0; row < item.tokens * item.group; ++row) {
        float* latent = partial.latent + row * rank;
        for (int c = 0; c < rank; ++c) latent[c] /= partial.sum[row];
        row_times_matrix(latent, decode, rank, head_dim, out);
        for (int d = 0; d < head_dim; ++d) out[d] += v_mean[d];
        const int64_t token = query_token(args, item, row);
        const int head = query_head(args, item, row);
        store_row(args.output, token, head, head_dim, out);
        if (args.lse_TH) {
            float* query = s.row + kMaxHeadDim;
            load_row(args.query, token, head, head_dim, query);
            float constant = 0;
            for (int d = 0; d < head_dim; ++d) constant += query[d] * k_mean[d];
            args.lse_TH[token * args.num_heads + head] =
                partial.max[row] + __builtin_logf(partial.sum[row]) + constant * args.softmax_scale;
        }
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
