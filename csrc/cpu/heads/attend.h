// Attention of one item: rows of one KV head over a range of tokens, in their stored form.
//
// Keys, absorbed: score = gain * sum_c (query @ decode^T)_c * step_c * code value_c (query . mean is the same for every
// key of a row and cancels in the softmax). Values: sum_t p_t gain_t code value_tc in latent space for all rows at once,
// steps, decoder and mean once at the end.
#pragma once

#include "cpu/core/float_side.h"
#include "cpu/core/half_side.h"
#include "cpu/core/integer_side.h"
#include "cpu/core/outliers.h"
#include "cpu/core/softmax.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// How a level computes one side of the cache. Every level has FLOATS, the plain form.
enum class Form { FLOATS, HALVES, INTEGERS };

KVC_INLINE Form form_of([[maybe_unused]] const kvc_side& side) {
#if KVC_LEVEL_NUMBER >= 3
    if (side.gain_offset >= 0) return Form::INTEGERS;
#endif
#if KVC_LEVEL_NUMBER >= 1
    if (side.bits[0] == 16) return Form::HALVES;
#endif
    return Form::FLOATS;
}

// Where each thread's temporary arrays start.
struct Scratch {
    float* row;  // a few rows of queries or outputs
    float* query;  // [rows][key positions] float32 queries, or:
    uint8_t* factors;  // [quads][rows][digits]
    void* headers;  // IntegerQuery[rows]
    void* keys;  // unpacked tile
    void* values;  // unpacked tile
    float* scores;  // [rows][tile]: scores, then weights
    uint8_t* weights;  // [tile / 4][rows][digits]
    float* sums;  // [rows][value positions]
    float* decay;  // [rows]
    float* poison;  // [rows]: NaN for a query that is not finite, else 0
    void* tile_weights;  // TileWeights[rows]
    float* absorbed;  // [rows / 4][key rank][4] queries, where keys have outliers
    float* exact;  // [rows / 4][value rank][4]: what outliers add to the sums, where values have any
    int key_width;  // positions or quads
    int value_width;
};

inline size_t lay_out(const kvc_heads_pages& pages, char* base, Scratch& s) {
    Arena arena{base};
    s.row = arena.take<float>(2 * kMatrixRows * kMaxHeadDim);
    s.scores = arena.take<float>(kMaxRows * kTile);
    s.decay = arena.take<float>(kMaxRows);
    s.poison = arena.take<float>(kMaxRows);
    switch (form_of(pages.k)) {
        case Form::FLOATS:
            s.key_width = key_positions(pages.k);
            s.query = arena.take<float>(static_cast<size_t>(kMaxRows * s.key_width));
            s.keys = arena.take<float>(static_cast<size_t>(kTile * s.key_width));
            break;
        case Form::HALVES:
            s.key_width = round_up(pages.k.rank, 16);
            s.query = arena.take<float>(static_cast<size_t>(kMaxRows * s.key_width));
            break;
        case Form::INTEGERS:
#if KVC_LEVEL_NUMBER >= 3
            s.key_width = key_quads(pages.k);
            s.factors = arena.take<uint8_t>(static_cast<size_t>(kMaxRows * kFactorBytes * s.key_width));
            s.headers = arena.take<IntegerQuery>(kMaxRows);
            s.keys = arena.take<uint8_t>(static_cast<size_t>(kTile * 4 * s.key_width));
#endif
            break;
    }
    switch (form_of(pages.v)) {
        case Form::FLOATS:
            s.value_width = float_positions(pages.v);
            s.values = arena.take<float>(static_cast<size_t>(kTile * s.value_width));
            break;
        case Form::HALVES: s.value_width = round_up(pages.v.rank, 16); break;
        case Form::INTEGERS:
#if KVC_LEVEL_NUMBER >= 3
            s.value_width = value_positions(pages.v);
            s.values = arena.take<uint8_t>(static_cast<size_t>(kTile * s.value_width));
            s.weights = arena.take<uint8_t>(kMaxRows * kFactorBytes * kTile / 4);
            s.tile_weights = arena.take<TileWeights>(kMaxRows);
#endif
            break;
    }
    s.sums = arena.take<float>(static_cast<size_t>(kMaxRows * s.value_width));
    if (pages.k.outliers) s.absorbed = arena.take<float>(static_cast<size_t>(kMaxRows * pages.k.rank));
    if (pages.v.outliers) s.exact = arena.take<float>(static_cast<size_t>(kMaxRows * pages.v.rank));
    return arena.used;
}

size_t attend_scratch_bytes(const kvc_heads_attend_args& args) {
    Scratch unused{};
    return lay_out(args.pages, nullptr, unused);
}

template <typename Args>
KVC_INLINE int64_t query_token(const Args& args, const Item& item, int row) {
    return args.batch.query_starts[item.request] + item.first_token + row / item.group;
}
template <typename Args>
KVC_INLINE int query_head(const Args& args, const Item& item, int row) {
    return item.kv_head * (args.batch.num_heads / args.pages.num_kv_heads) + item.first_group + row % item.group;
}
// Tokens a row sees: those up to its own.
template <typename Args>
KVC_INLINE int visible(const Args& args, const Item& item, int row) {
    const int queries = args.batch.query_starts[item.request + 1] - args.batch.query_starts[item.request];
    return args.batch.seq_lens[item.request] - queries + item.first_token + row / item.group + 1;
}

inline void absorb_queries(const kvc_heads_attend_args& args, const Item& item, int rows, Scratch& s) {
    const kvc_side& side = args.pages.k;
    const int head_dim = args.pages.head_dim;
    const float* decode = args.k_decode_HDR + static_cast<int64_t>(item.kv_head) * head_dim * side.rank;
    for (int first = 0; first < rows; first += kMatrixRows) {
        const int count = min_of(rows - first, kMatrixRows);
        float *queries = s.row, *absorbed = s.row + kMatrixRows * kMaxHeadDim;
        for (int i = 0; i < count; ++i) {
            const int row = first + i;
            load_row(args.query, query_token(args, item, row), query_head(args, item, row), head_dim,
                     queries + i * kMaxHeadDim);
            for (int d = 0; d < head_dim; ++d) queries[i * kMaxHeadDim + d] *= args.batch.softmax_scale;
        }
        rows_times_matrix(queries, count, kMaxHeadDim, decode, head_dim, side.rank, absorbed, kMaxHeadDim);
        for (int i = 0; i < count; ++i) {
            const float* from = absorbed + i * kMaxHeadDim;
            const int row = first + i;
            s.poison[row] = 0;
            for (int c = 0; c < side.rank; ++c) s.poison[row] += from[c] * 0.f;
            if (side.outliers)
                for (int c = 0; c < side.rank; ++c) s.absorbed[at_row(row, side.rank) + 4 * c] = from[c];
            switch (form_of(side)) {
                case Form::FLOATS: key_query(side, from, s.query + row * s.key_width); break;
                case Form::HALVES:
                    std::memset(s.query + row * s.key_width, 0, sizeof(float) * static_cast<size_t>(s.key_width));
                    std::memcpy(s.query + row * s.key_width, from, sizeof(float) * static_cast<size_t>(side.rank));
                    break;
                case Form::INTEGERS:
#if KVC_LEVEL_NUMBER >= 3
                    integer_query(side, from, s.key_width, static_cast<IntegerQuery*>(s.headers)[row],
                                  s.factors + row * kFactorBytes, rows * kFactorBytes);
#endif
                    break;
            }
        }
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

KVC_INLINE const uint8_t* record_of(const kvc_heads_attend_args& args, const Item& item, int token) {
    const int32_t block =
        args.batch.block_table[item.request * args.batch.block_table_stride + token / args.pages.block_size];
    return args.pages.data + block * args.pages.block_stride + item.kv_head * args.pages.head_stride;
}

// A tile: where its groups of sixteen tokens lie, and its gains.
struct Tile {
    int tokens;
    const uint8_t* k_codes[kTileGroups];
    const uint8_t* v_codes[kTileGroups];
    alignas(kAlign) float k_gain[kTile];
    alignas(kAlign) float v_gain[kTile];
    Outliers k_outliers, v_outliers;

    KVC_INLINE int groups() const { return (tokens + kGroup - 1) / kGroup; }
    KVC_INLINE int tokens_of(int group) const { return min_of(tokens - group * kGroup, kGroup); }
};

// Finds and unpacks a tile. Slots past `tokens` hold anything but have gain 0.
inline void read_tile(const kvc_heads_attend_args& args, const Item& item, int start, Scratch& s, Tile& tile) {
    const kvc_heads_pages& pages = args.pages;
    std::memset(tile.k_gain, 0, sizeof tile.k_gain);
    std::memset(tile.v_gain, 0, sizeof tile.v_gain);
    for (int group = 0; group < tile.groups(); ++group) {
        const int first = start + group * kGroup, offset = first % pages.block_size, count = tile.tokens_of(group);
        const uint8_t* record = record_of(args, item, first);
        const uint8_t* k_codes = tile.k_codes[group] = record + pages.k.code_offset + offset * pages.k.code_bytes;
        const uint8_t* v_codes = tile.v_codes[group] = record + pages.v.code_offset + offset * pages.v.code_bytes;
        read_gains(pages.k, record, offset, count, tile.k_gain + group * kGroup);
        read_gains(pages.v, record, offset, count, tile.v_gain + group * kGroup);
        if (pages.k.outliers)
            read_outliers(pages.k, record, offset, tile.k_gain + group * kGroup, group, tile.k_outliers);
        if (pages.v.outliers)
            read_outliers(pages.v, record, offset, tile.v_gain + group * kGroup, group, tile.v_outliers);
        if (form_of(pages.k) == Form::FLOATS)
            unpack_keys(pages.k, k_codes, static_cast<float*>(s.keys) + group * kGroup);
        if (form_of(pages.v) == Form::FLOATS)
            for (int i = 0; i < count; ++i)
                unpack_value(pages.v, v_codes + i * pages.v.code_bytes,
                             static_cast<float*>(s.values) + (group * kGroup + i) * s.value_width);
#if KVC_LEVEL_NUMBER >= 3
        if (form_of(pages.k) == Form::INTEGERS)
            unpack_keys_integer(pages.k, k_codes, static_cast<uint8_t*>(s.keys) + group * s.key_width * 64);
        if (form_of(pages.v) == Form::INTEGERS)
            for (int quad = 0; 4 * quad < count; ++quad)
                unpack_values_integer(pages.v, v_codes + 4 * quad * pages.v.code_bytes,
                                      static_cast<uint8_t*>(s.values) + (4 * group + quad) * 4 * s.value_width);
#endif
    }
}

#if KVC_LEVEL_NUMBER >= 3
KVC_INLINE Ahead ahead_of(const kvc_heads_attend_args& args, const Item& item, const kvc_side& side, int token) {
    const uint8_t* record = record_of(args, item, token);
    const int offset = token % args.pages.block_size, count = min_of(kTile, args.pages.block_size - offset);
    if (side.gain_offset >= 0)
        for (int i = 0; i < count; i += 32) __builtin_prefetch(record + side.gain_offset + 2 * (offset + i));
    for (int i = 0; i < side.outliers * count; i += 32) {
        __builtin_prefetch(record + side.outlier_offset + 2 * (side.outliers * offset + i));
        __builtin_prefetch(record + side.channel_offset + side.outliers * offset + i);
    }
    const uint8_t* codes = record + side.code_offset + offset * side.code_bytes;
    return {codes, codes + count * side.code_bytes};
}
#endif

inline void attend_tile(const kvc_heads_attend_args& args, const Item& item, int start, int stop, int rows,
                        const Partial& partial, Scratch& s) {
    const kvc_heads_pages& pages = args.pages;
    Tile tile;
    tile.tokens = min_of(stop - start, kTile);
    read_tile(args, item, start, s, tile);
#if KVC_LEVEL_NUMBER >= 3
    const int next = start + kTile < stop ? start + kTile : start;
#endif
    switch (form_of(pages.k)) {
        case Form::FLOATS:
            score_tile(s.query, s.key_width, rows, static_cast<float*>(s.keys), s.key_width, tile.tokens, s.scores);
            break;
        case Form::HALVES:
#if KVC_LEVEL_NUMBER >= 1
            for (int group = 0; group < tile.groups(); ++group)
                score_group_half(s.query, s.key_width, rows, pages.k, tile.k_codes[group], s.scores + group * kGroup);
#endif
            break;
        case Form::INTEGERS:
#if KVC_LEVEL_NUMBER >= 3
            score_tile_integer(static_cast<IntegerQuery*>(s.headers), s.factors, rows, static_cast<uint8_t*>(s.keys),
                               s.key_width, s.scores, ahead_of(args, item, pages.k, next));
#endif
            break;
    }
    const int outlier_tokens = tile.groups() * kGroup;
    if (pages.k.outliers) score_outliers(pages.k, tile.k_outliers, s.absorbed, rows, outlier_tokens, s.scores);
    for (int row = 0; row < rows; ++row) {
        float largest, weight_sum;
        float* scores = s.scores + row * kTile;
        const int seen = min_of(visible(args, item, row) - start, tile.tokens);
        s.decay[row] =
            soften(scores, tile.k_gain, tile.v_gain, seen, partial.max[row], partial.sum[row], largest, weight_sum);
#if KVC_LEVEL_NUMBER >= 3
        if (form_of(pages.v) == Form::INTEGERS) {
            const float scale = integer_weights(scores, largest, s.weights + row * kFactorBytes, rows * kFactorBytes);
            static_cast<TileWeights*>(s.tile_weights)[row] = {s.decay[row], scale, 0.5f * weight_sum};
        }
#endif
    }
    if (pages.v.outliers) mix_outliers(pages.v, tile.v_outliers, s.scores, s.decay, rows, outlier_tokens, s.exact);
    switch (form_of(pages.v)) {
        case Form::FLOATS:
            mix_tile(s.scores, s.decay, rows, static_cast<float*>(s.values), tile.tokens, s.value_width, s.value_width,
                     s.sums);
            break;
        case Form::HALVES:
#if KVC_LEVEL_NUMBER >= 1
            for (int group = 0; group < tile.groups(); ++group) {
                if (group == 1)
                    for (int row = 0; row < rows; ++row) s.decay[row] = 1;
                mix_group_half(s.scores + group * kGroup, s.decay, rows, pages.v, tile.v_codes[group],
                               tile.tokens_of(group), s.value_width, s.sums);
            }
#endif
            break;
        case Form::INTEGERS: {
#if KVC_LEVEL_NUMBER >= 3
            Ahead ahead = ahead_of(args, item, pages.v, next);
            mix_tile_integer(static_cast<TileWeights*>(s.tile_weights), s.weights, rows,
                             static_cast<uint8_t*>(s.values), (tile.tokens + 3) / 4, s.value_width, s.value_width,
                             s.sums, ahead);
#endif
            break;
        }
    }
}

void attend(const kvc_heads_attend_args& args, const Item& item, int start, int stop, const Partial& partial,
            void* scratch) {
    Scratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const int rows = item.tokens * item.group;
    for (int row = 0; row < rows; ++row) {
        partial.max[row] = -__builtin_inff();
        partial.sum[row] = 0;
    }
    std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(rows * s.value_width));
    if (args.pages.v.outliers)
        std::memset(s.exact, 0, sizeof(float) * static_cast<size_t>(round_up(rows, 4) * args.pages.v.rank));
    // Rows that fill up the last four of outliers: any finite numbers.
    if (args.pages.k.outliers || args.pages.v.outliers)
        for (int row = rows; row < round_up(rows, 4); ++row) {
            std::memset(s.scores + row * kTile, 0, sizeof(float) * kTile);
            s.decay[row] = 1;
        }
    if (args.pages.k.outliers)
        std::memset(s.absorbed, 0, sizeof(float) * static_cast<size_t>(round_up(rows, 4) * args.pages.k.rank));
    absorb_queries(args, item, rows, s);
    for (int tile = start; tile < stop; tile += kTile) attend_tile(args, item, tile, stop, rows, partial, s);
    // Comparisons and integers would hide it.
    for (int row = 0; row < rows; ++row) partial.sum[row] += s.poison[row];
    for (int row = 0; row < rows; ++row) {
        const float* sums = s.sums + row * s.value_width;
        float* latent = partial.latent + row * args.pages.v.rank;
        switch (form_of(args.pages.v)) {
            case Form::FLOATS: value_channels(args.pages.v, sums, latent); break;
            case Form::HALVES: std::memcpy(latent, sums, sizeof(float) * static_cast<size_t>(args.pages.v.rank)); break;
            case Form::INTEGERS:
#if KVC_LEVEL_NUMBER >= 3
                value_channels_integer(args.pages.v, sums, latent);
#endif
                break;
        }
        if (args.pages.v.outliers)
            for (int c = 0; c < args.pages.v.rank; ++c) latent[c] += s.exact[at_row(row, args.pages.v.rank) + 4 * c];
    }
}

int attend_width(const kvc_heads_attend_args& args) { return args.pages.v.rank; }

void merge(const kvc_heads_attend_args& args, const Item& item, const Partial& into, const Partial& from) {
    merge_rows(item.rows(), args.pages.v.rank, into, from);
}

void finish(const kvc_heads_attend_args& args, const Item& item, const Partial& partial, void* scratch) {
    Scratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const int rank = args.pages.v.rank, head_dim = args.pages.head_dim;
    const float* decode = args.v_decode_HRD + static_cast<int64_t>(item.kv_head) * rank * head_dim;
    const float* v_mean = args.v_mean_HD + item.kv_head * head_dim;
    const float* k_mean = args.k_mean_HD + item.kv_head * head_dim;
    const int rows = item.tokens * item.group;
    for (int row = 0; row < rows; ++row)
        for (int c = 0; c < rank; ++c) partial.latent[row * rank + c] /= partial.sum[row];
    for (int first = 0; first < rows; first += kMatrixRows) {
        float *latents = s.row, *outputs = s.row + kMatrixRows * kMaxHeadDim;
        const int count = min_of(rows - first, kMatrixRows);
        for (int i = 0; i < count; ++i)
            std::memcpy(latents + i * kMaxHeadDim, partial.latent + (first + i) * rank,
                        sizeof(float) * static_cast<size_t>(rank));
        rows_times_matrix(latents, count, kMaxHeadDim, decode, rank, head_dim, outputs, kMaxHeadDim);
        for (int i = 0; i < count; ++i) {
            const int row = first + i, head = query_head(args, item, row);
            const int64_t token = query_token(args, item, row);
            float* out = outputs + i * kMaxHeadDim;
            for (int d = 0; d < head_dim; ++d) out[d] += v_mean[d];
            store_row(args.output, token, head, head_dim, out);
            if (!args.lse_TH) continue;
            float* query = latents + i * kMaxHeadDim;
            load_row(args.query, token, head, head_dim, query);
            float constant = 0;
            for (int d = 0; d < head_dim; ++d) constant += query[d] * k_mean[d];
            args.lse_TH[token * args.batch.num_heads + head] =
                partial.max[row] + __builtin_logf(partial.sum[row]) + constant * args.batch.softmax_scale;
        }
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
