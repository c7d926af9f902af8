// Attention of one item on complete blocks in compressed form and newer tokens as they are; codec/blocks/codec.py has the rule.
//
// A block's latents are D + A B^T + S. Nothing of the sum is formed: with u = query @ decode^T, scores are
// u . D + (u B) . A + u . S, and values p . D + (p A) B^T + p . S, all in latent space; the decoder comes once at the end.
// Unlike in a cache of one form, the constant query . mean counts, because exact keys stand in the same softmax, and the
// mean of values counts by the share of the weights that compressed tokens have.
#pragma once

#include "cpu/blocks/codes.h"
#include "cpu/heads/attend.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// Where each thread's temporary arrays start.
struct BlockScratch {
    float* row;  // a few rows of queries or outputs
    float* query;  // [rows][padded head_dim], scaled
    float* absorbed;  // [rows][padded key rank]
    float* ordered;  // the same in fold order
    float* side_by_side;  // the same as [rows / 4][key rank][4], for outliers
    float* constant;  // [rows]: query . mean
    float* poison;  // [rows]: NaN for a query that is not finite, else 0
    float* low;  // [rows][kMaxLowRank]
    float* scores;  // [rows][tile]: scores, then weights
    float* whole;  // [rows][tile]
    float* decay;  // [rows]
    float* k_scale;  // [groups of tokens][padded key rank], in fold order
    float* k_zero;
    float* v_scale;  // [groups of channels][tile]
    float* v_zero;
    float* k_channels;  // [low rank][padded rank]
    float* v_channels;
    float* tokens;  // [low rank][tile]
    Sparse k_sparse;
    Sparse v_sparse;
    Folded* folded;  // [rows]
    uint8_t* factors;  // folded queries
    KeyCode* keys;  // unpacked tile
    ValueCode* values;
    MixScratch mix;
    float* sums;  // [rows][value positions]: what codes add
    float* residual;  // [rows][padded value rank]: what low-rank residuals add
    float* outliers;  // [rows / 4][value rank][4]: what outliers add
    float* mass;  // [rows]: weights of compressed tokens
    float* exact_rows;  // [tile][padded head_dim]
    float* exact_sums;  // [rows][padded head_dim]
    int key_width;
    int value_width;
    int head_width;
    int k_groups;  // of a block's tokens
    int v_groups;  // of a token's channels
};

KVC_INLINE int groups_of(int values, int group) { return (values + group - 1) / group; }
KVC_INLINE kvc_side value_group(const kvc_blocks_side& side, int group) {
    return band_of(side, min_of(side.group, side.rank - group * side.group));
}

inline size_t lay_out(const kvc_blocks_pages& pages, char* base, BlockScratch& s) {
    Arena arena{base};
    const auto floats = [&](int rows, int columns) {
        return arena.take<float>(static_cast<size_t>(rows) * static_cast<size_t>(columns));
    };
    const auto sparse = [&](const kvc_blocks_side& side) {
        const auto count = static_cast<size_t>(round_up(side.outliers, 16));
        return Sparse{arena.take<int32_t>(count), arena.take<int32_t>(count), arena.take<float>(count), 0};
    };
    const kvc_blocks_side &k = pages.k, &v = pages.v;
    s.head_width = round_up(pages.head_dim, 16);
    s.k_groups = groups_of(pages.block, k.group);
    s.v_groups = groups_of(v.rank, v.group);
    s.key_width = key_code_width(k);
    s.value_width = 0;
    for (int group = 0; group < s.v_groups; ++group) s.value_width += value_code_width(value_group(v, group));
    s.row = floats(2 * kMatrixRows, kMaxHeadDim);
    s.query = floats(kMaxRows, s.head_width);
    s.absorbed = floats(kMaxRows, padded_rank(k));
    s.ordered = floats(kMaxRows, padded_rank(k));
    s.side_by_side = floats(kMaxRows, k.outliers ? k.rank : 0);
    s.constant = floats(kMaxRows, 1);
    s.poison = floats(kMaxRows, 1);
    s.low = floats(kMaxRows, kMaxLowRank);
    s.scores = floats(kMaxRows, kTile);
    s.whole = floats(kMaxRows, kTile);
    s.decay = floats(kMaxRows, 1);
    s.k_scale = floats(s.k_groups, padded_rank(k));
    s.k_zero = floats(s.k_groups, padded_rank(k));
    s.v_scale = floats(s.v_groups, kTile);
    s.v_zero = floats(s.v_groups, kTile);
    s.k_channels = floats(k.low_rank, padded_rank(k));
    s.v_channels = floats(v.low_rank, padded_rank(v));
    s.tokens = floats(kMaxLowRank, kTile);
    s.k_sparse = sparse(k);
    s.v_sparse = sparse(v);
    s.folded = arena.take<Folded>(kMaxRows);
    s.factors = arena.take<uint8_t>(kMaxRows * folded_bytes(k));
    s.keys = arena.take<KeyCode>(static_cast<size_t>(kTile * (s.key_width + 1)));  // whole vectors of tokens are read
    s.values = arena.take<ValueCode>(static_cast<size_t>(kTile * s.value_width));
    s.mix.weights = floats(kMaxRows, kTile);
#if KVC_LEVEL_NUMBER >= 3
    s.mix.digits = arena.take<uint8_t>(kMaxRows * kFactorBytes * kTile / 4);
    s.mix.headers = arena.take<TileWeights>(kMaxRows);
#endif
    s.sums = floats(kMaxRows, s.value_width);
    s.residual = floats(kMaxRows, padded_rank(v));
    s.outliers = floats(kMaxRows, v.outliers ? v.rank : 0);
    s.mass = floats(kMaxRows, 1);
    s.exact_rows = floats(kTile, s.head_width);
    s.exact_sums = floats(kMaxRows, s.head_width);
    return arena.used;
}

size_t block_scratch_bytes(const kvc_blocks_attend_args& args) {
    BlockScratch unused{};
    return lay_out(args.pages, nullptr, unused);
}

// Latents, then exact values, then the weights of compressed tokens.
int block_width(const kvc_blocks_attend_args& args) { return args.pages.v.rank + args.pages.head_dim + 1; }

inline void absorb_queries(const kvc_blocks_attend_args& args, const Item& item, int rows, BlockScratch& s) {
    const kvc_blocks_side& side = args.pages.k;
    const int head_dim = args.pages.head_dim, width = padded_rank(side);
    const float* decode = args.k_decode_HDR + static_cast<int64_t>(item.kv_head) * head_dim * side.rank;
    const float* mean = args.k_mean_HD + item.kv_head * head_dim;
    std::memset(s.query, 0, sizeof(float) * static_cast<size_t>(rows * s.head_width));
    std::memset(s.absorbed, 0, sizeof(float) * static_cast<size_t>(rows * width));
    for (int row = 0; row < rows; ++row) {
        float* query = s.query + row * s.head_width;
        load_row(args.query, query_token(args, item, row), query_head(args, item, row), head_dim, query);
        s.constant[row] = s.poison[row] = 0;
        for (int d = 0; d < head_dim; ++d) {
            query[d] *= args.batch.softmax_scale;
            s.constant[row] += query[d] * mean[d];
            s.poison[row] += query[d] * 0.f;
        }
    }
    for (int first = 0; first < rows; first += kMatrixRows)
        rows_times_matrix(s.query + first * s.head_width, min_of(rows - first, kMatrixRows), s.head_width, decode,
                          head_dim, side.rank, s.absorbed + first * width, width);
    std::memcpy(s.ordered, s.absorbed, sizeof(float) * static_cast<size_t>(rows * width));
    for (int row = 0; row < rows; ++row) {
        fold_order(side, s.ordered + row * width);
        if (side.outliers)
            for (int c = 0; c < side.rank; ++c)
                s.side_by_side[at_row(row, side.rank) + 4 * c] = s.absorbed[row * width + c];
    }
}

KVC_INLINE const uint8_t* record_of(const kvc_blocks_attend_args& args, const Item& item, int token) {
    const kvc_blocks_pages& pages = args.pages;
    const int32_t page =
        args.batch.block_table[item.request * args.batch.block_table_stride + token / pages.block_size];
    return pages.data + page * pages.block_stride + item.kv_head * pages.head_stride +
           token % pages.block_size / pages.block * pages.record_bytes;
}

// Scores of a tile's rows to weights; what the row has summed up so far must be multiplied by its decay.
inline void soften_rows(const Partial& partial, int rows, const int* seen, float* scores, float* decay, float* mass) {
    alignas(kAlign) float ones[kTile];
    for (int i = 0; i < kTile; ++i) ones[i] = 1;
    for (int row = 0; row < rows; ++row) {
        float largest, weight_sum;
        decay[row] = soften(scores + row * kTile, ones, ones, seen[row], partial.max[row], partial.sum[row], largest,
                            weight_sum);
        mass[row] = mass[row] * decay[row] + weight_sum;
    }
}

// ---- a complete block ----------------------------------------------------------------------------------------------

KVC_NOINLINE void read_block(const kvc_blocks_pages& pages, const uint8_t* record, BlockScratch& s) {
    const kvc_blocks_side &k = pages.k, &v = pages.v;
    read_halves(record + k.scale_offset, k.rank, s.k_groups, s.k_scale, padded_rank(k));
    read_halves(record + k.zero_offset, k.rank, s.k_groups, s.k_zero, padded_rank(k));
    for (int group = 0; group < s.k_groups; ++group) {
        fold_order(k, s.k_scale + group * padded_rank(k));
        fold_order(k, s.k_zero + group * padded_rank(k));
    }
    read_halves(record + k.channel_offset, k.rank, k.low_rank, s.k_channels, padded_rank(k));
    read_halves(record + v.channel_offset, v.rank, v.low_rank, s.v_channels, padded_rank(v));
    read_sparse(k, pages.block, record, s.k_sparse);
    read_sparse(v, pages.block, record, s.v_sparse);
}

// Scores of a tile; groups of tokens that share their scales are taken together.
KVC_NOINLINE void score_sealed(const kvc_blocks_pages& pages, const uint8_t* record, int start, int tokens, int rows,
                               int& folded_group, BlockScratch& s, Ahead& ahead) {
    const kvc_blocks_side& k = pages.k;
    const kvc_side band = band_of(k, k.rank);
    for (int group = 0; group * kGroup < tokens; ++group)
        unpack_block_keys(band, record + k.code_offset + (start + group * kGroup) * band.code_bytes,
                          key_group(s.keys, group, s.key_width));
    for (int first = 0; first < tokens;) {
        const int scales = (start + first) / k.group,
                  end = static_cast<int>(min_of(tokens, (scales + 1) * k.group - start));
        if (scales != folded_group)
            fold_queries(k, s.ordered, rows, s.k_scale + scales * padded_rank(k), s.k_zero + scales * padded_rank(k),
                         s.folded, s.factors);
        folded_group = scales;
        score_codes(k, s.folded, s.factors, rows, key_group(s.keys, first / kGroup, s.key_width),
                    (end - first) / kGroup, s.whole, s.scores + first, ahead);
        first = end;
    }
    read_halves(record + k.token_offset + 2 * k.low_rank * start, tokens, k.low_rank, s.tokens, kTile);
    for (int row = 0; row < rows; ++row) {
        float* scores = s.scores + row * kTile;
        for (int t = 0; t < kTile; t += kLanes) store(scores + t, load(scores + t) + s.constant[row]);
        expand(s.low + row * kMaxLowRank, s.tokens, kTile, kTile, k.low_rank, scores);
    }
    const int outliers = of_tile(s.k_sparse, k.outliers, start);
    if (k.outliers) score_sparse(s.k_sparse, outliers, start, s.side_by_side, k.rank, rows, s.scores);
}

KVC_NOINLINE void mix_sealed(const kvc_blocks_pages& pages, const uint8_t* record, int start, int tokens, int rows,
                             BlockScratch& s, Ahead& ahead) {
    const kvc_blocks_side& v = pages.v;
    read_halves(record + v.scale_offset + 2 * s.v_groups * start, tokens, s.v_groups, s.v_scale, kTile);
    read_halves(record + v.zero_offset + 2 * s.v_groups * start, tokens, s.v_groups, s.v_zero, kTile);
    for (int group = 0, place = 0; group < s.v_groups; ++group) {
        const kvc_side band = value_group(v, group);
        const uint8_t* codes = record + v.code_offset + start * band.code_bytes + group * v.group * v.bits / 8;
        for (int first = 0; first < tokens; first += kGroup)
            unpack_block_values(band, codes + first * band.code_bytes, s.value_width,
                                s.values + first * s.value_width + kValueUnit * place);
        mix_codes(band, s.mix, s.scores, s.decay, rows, s.v_scale + group * kTile, s.v_zero + group * kTile,
                  s.values + kValueUnit * place, tokens, s.value_width, s.sums + place, ahead);
        place += value_code_width(band);
    }
    const int outliers = of_tile(s.v_sparse, v.outliers, start);
    if (v.outliers) mix_sparse(s.v_sparse, outliers, start, s.scores, s.decay, v.rank, rows, s.outliers);
    if (!v.low_rank) return;
    read_halves(record + v.token_offset + 2 * v.low_rank * start, tokens, v.low_rank, s.tokens, kTile);
    for (int row = 0; row < rows; ++row) {
        float low[kMaxLowRank];
        project(s.scores + row * kTile, s.tokens, kTile, kTile, v.low_rank, low);
        float* residual = s.residual + row * padded_rank(v);
        scale_row(residual, padded_rank(v), s.decay[row]);
        expand(low, s.v_channels, padded_rank(v), padded_rank(v), v.low_rank, residual);
    }
}

// Bytes of a side in the block that comes after, to be asked for while this one is computed.
KVC_INLINE Ahead bytes_ahead([[maybe_unused]] const uint8_t* record, [[maybe_unused]] int64_t offset,
                             [[maybe_unused]] int nbytes) {
#if KVC_LEVEL_NUMBER >= 3
    return {record + offset, record + offset + nbytes};
#else
    return {};
#endif
}

inline void attend_sealed(const kvc_blocks_attend_args& args, const Item& item, int block_start, int next, int rows,
                          const Partial& partial, BlockScratch& s) {
    const kvc_blocks_pages& pages = args.pages;
    const uint8_t* record = record_of(args, item, block_start);
    const uint8_t* after = record_of(args, item, next);
    Ahead keys = bytes_ahead(after, pages.k.code_offset, pages.k.nbytes),
          values = bytes_ahead(after, pages.v.code_offset, pages.v.nbytes);
    read_block(pages, record, s);
    const int width = padded_rank(pages.k);
    for (int row = 0; row < rows; ++row)
        project(s.absorbed + row * width, s.k_channels, width, width, pages.k.low_rank, s.low + row * kMaxLowRank);
    int folded_group = -1;
    for (int start = 0; start < pages.block; start += kTile) {
        const int tokens = min_of(pages.block - start, kTile);
        score_sealed(pages, record, start, tokens, rows, folded_group, s, keys);
        int seen[kMaxRows];
        for (int row = 0; row < rows; ++row)
            seen[row] = visible(args, item, row) >= block_start + pages.block ? tokens : 0;
        soften_rows(partial, rows, seen, s.scores, s.decay, s.mass);
        for (int row = 0; row < rows; ++row) scale_row(s.exact_sums + row * s.head_width, s.head_width, s.decay[row]);
        mix_sealed(pages, record, start, tokens, rows, s, values);
    }
}

// ---- exact tokens --------------------------------------------------------------------------------------------------

// Keys or values of tokens [start, start + tokens) to exact_rows: the step's own, or from the ring what came before.
inline void read_exact(const kvc_blocks_attend_args& args, const Item& item, const kvc_rows& rows, int side, int start,
                       int tokens, BlockScratch& s) {
    const int head_dim = args.pages.head_dim, first_query = args.batch.query_starts[item.request];
    const int before = args.batch.seq_lens[item.request] - (args.batch.query_starts[item.request + 1] - first_query);
    const kvc_blocks_rings& rings = args.rings;
    const int64_t in_ring = args.ring_of[item.request] * rings.ring_stride + item.kv_head * rings.head_stride +
                            side * rings.places * head_dim;
    const kvc_rows ring = {const_cast<void*>(rings.data), head_dim, 0, rings.dtype};
    for (int i = 0; i < tokens; ++i) {
        float* target = s.exact_rows + i * s.head_width;
        const int position = start + i;
        std::memset(target + head_dim, 0, sizeof(float) * static_cast<size_t>(s.head_width - head_dim));
        if (position >= before) {
            load_row(rows, first_query + position - before, item.kv_head, head_dim, target);
        } else {
            kvc_rows place = ring;
            place.data = const_cast<void*>(row_at(ring, position % rings.places, 0));
            place.data = static_cast<char*>(place.data) + in_ring * (rings.dtype == KVC_FLOAT32 ? 4 : 2);
            load_row(place, 0, 0, head_dim, target);
        }
    }
}

// score[row][token] = query[row] . key[token]
inline void score_exact(const float* queries, const float* keys, int width, int rows, int tokens, float* scores) {
    for (int row = 0; row < rows; ++row)
        for (int token = 0; token < tokens; ++token) {
            VecF total = {};
            for (int d = 0; d < width; d += kLanes)
                total += load(queries + row * width + d) * load(keys + token * width + d);
            scores[row * kTile + token] = sum(total);
        }
}

KVC_NOINLINE void attend_exact(const kvc_blocks_attend_args& args, const Item& item, int block_start, int stop,
                               int rows, const Partial& partial, BlockScratch& s) {
    const kvc_blocks_side& v = args.pages.v;
    const int end = block_start + args.pages.block;
    for (int start = block_start; start < stop; start += kTile) {
        const int tokens = min_of(stop - start, kTile);
        int seen[kMaxRows];
        for (int row = 0; row < rows; ++row) {
            const int length = visible(args, item, row);
            seen[row] = length < end ? min_of(length - start, tokens) : 0;
        }
        read_exact(args, item, args.keys, 0, start, tokens, s);
        score_exact(s.query, s.exact_rows, s.head_width, rows, tokens, s.scores);
        float none[kMaxRows] = {};
        soften_rows(partial, rows, seen, s.scores, s.decay, none);
        read_exact(args, item, args.values, 1, start, tokens, s);
        mix_tile(s.scores, s.decay, rows, s.exact_rows, tokens, s.head_width, s.head_width, s.exact_sums);
        for (int row = 0; row < rows; ++row) {
            const float decay = s.decay[row];
            if (decay == 1) continue;
            s.mass[row] *= decay;
            scale_row(s.sums + row * s.value_width, s.value_width, decay);
            scale_row(s.residual + row * padded_rank(v), padded_rank(v), decay);
            for (int c = 0; v.outliers && c < v.rank; ++c) s.outliers[at_row(row, v.rank) + 4 * c] *= decay;
        }
    }
}

// ---- all of it -----------------------------------------------------------------------------------------------------

KVC_INLINE void clear(float* floats, int rows, int columns) {
    std::memset(floats, 0, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(columns));
}

void attend_blocks(const kvc_blocks_attend_args& args, const Item& item, int start, int stop, const Partial& partial,
                   void* scratch) {
    BlockScratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const kvc_blocks_side &k = args.pages.k, &v = args.pages.v;
    const int rows = item.rows(), fours = round_up(rows, 4), head_dim = args.pages.head_dim, block = args.pages.block;
    for (int row = 0; row < rows; ++row) {
        partial.max[row] = -__builtin_inff();
        partial.sum[row] = 0;
    }
    clear(s.sums, rows, s.value_width);
    clear(s.residual, rows, padded_rank(v));
    clear(s.outliers, fours, v.outliers ? v.rank : 0);
    clear(s.exact_sums, rows, s.head_width);
    clear(s.mass, rows, 1);
    // Padding that takes part: rows up to whole fours of outliers, channels and tokens up to whole vectors.
    clear(s.side_by_side, fours, k.outliers ? k.rank : 0);
    clear(s.scores, fours, kTile);
    for (int row = rows; row < fours; ++row) s.decay[row] = 1;
    clear(s.k_scale, s.k_groups, padded_rank(k));
    clear(s.k_zero, s.k_groups, padded_rank(k));
    clear(s.v_scale, s.v_groups, kTile);
    clear(s.v_zero, s.v_groups, kTile);
    clear(s.k_channels, k.low_rank, padded_rank(k));
    clear(s.v_channels, v.low_rank, padded_rank(v));
    clear(s.tokens, kMaxLowRank, kTile);
    absorb_queries(args, item, rows, s);
    const int first_seen = visible(args, item, 0), last_seen = visible(args, item, rows - 1);
    for (int low = start; low < stop; low += block) {
        const int end = low + block;
        if (end <= last_seen)
            attend_sealed(args, item, low, end + block <= min_of(last_seen, stop) ? end : low, rows, partial, s);
        // The block is open for queries of its own tokens, the last one's excepted.
        if (first_seen < end && last_seen > low) attend_exact(args, item, low, min_of(stop, end - 1), rows, partial, s);
    }
    const int width = block_width(args);
    for (int row = 0; row < rows; ++row) {
        partial.sum[row] += s.poison[row];  // comparisons and integers would hide it
        float *latent = partial.latent + row * width, *exact = latent + v.rank;
        for (int group = 0, place = 0; group < s.v_groups; ++group) {
            const kvc_side band = value_group(v, group);
            block_channels(band, s.sums + row * s.value_width + place, latent + group * v.group);
            place += value_code_width(band);
        }
        for (int c = 0; c < v.rank; ++c) latent[c] += s.residual[row * padded_rank(v) + c];
        for (int c = 0; v.outliers && c < v.rank; ++c) latent[c] += s.outliers[at_row(row, v.rank) + 4 * c];
        std::memcpy(exact, s.exact_sums + row * s.head_width, sizeof(float) * static_cast<size_t>(head_dim));
        exact[head_dim] = s.mass[row];
    }
}

void merge_blocks(const kvc_blocks_attend_args& args, const Item& item, const Partial& into, const Partial& from) {
    merge_rows(item.rows(), block_width(args), into, from);
}

void finish_blocks(const kvc_blocks_attend_args& args, const Item& item, const Partial& partial, void* scratch) {
    BlockScratch s{};
    lay_out(args.pages, static_cast<char*>(scratch), s);
    const int rank = args.pages.v.rank, head_dim = args.pages.head_dim, width = block_width(args);
    const float* decode = args.v_decode_HRD + static_cast<int64_t>(item.kv_head) * rank * head_dim;
    const float* mean = args.v_mean_HD + item.kv_head * head_dim;
    const int rows = item.rows();
    for (int first = 0; first < rows; first += kMatrixRows) {
        const int count = min_of(rows - first, kMatrixRows);
        rows_times_matrix(partial.latent + first * width, count, width, decode, rank, head_dim, s.row, kMaxHeadDim);
        for (int i = 0; i < count; ++i) {
            const int row = first + i, head = query_head(args, item, row);
            const int64_t token = query_token(args, item, row);
            const float *exact = partial.latent + row * width + rank, inverse = 1.f / partial.sum[row];
            float* out = s.row + i * kMaxHeadDim;
            for (int d = 0; d < head_dim; ++d) out[d] = (out[d] + exact[d] + exact[head_dim] * mean[d]) * inverse;
            store_row(args.output, token, head, head_dim, out);
            if (args.lse_TH)
                args.lse_TH[token * args.batch.num_heads + head] = partial.max[row] + __builtin_logf(partial.sum[row]);
        }
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
