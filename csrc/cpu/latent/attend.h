// MLA: attention whose keys are one vector per token for all heads, and whose values are that vector's first channels.
//
// A tile is converted to float32 once and serves as keys and as values of every head. With 32 heads and more this is
// arithmetic, not memory traffic: two multiply-adds per channel, head and token.
#pragma once

#include "cpu/core/dense_tile.h"
#include "cpu/core/softmax.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {
namespace latent {

struct Scratch {
    float* query;  // [rows][width]
    float* tile;  // [tile][width]
    float* scores;  // [rows][tile]
    float* sums;  // [rows][width]
    float* decay;  // [rows]
    float* poison;  // [rows]: NaN for a query that is not finite, else 0
    float* ones;  // [tile]: the gains of numbers without one
};

inline size_t lay_out(const kvc_latent_attend_args& args, char* base, Scratch& s) {
    Arena arena{base};
    const auto width = static_cast<size_t>(dense_width(args.pages.channels));
    s.query = arena.take<float>(kMaxRows * width);
    s.tile = arena.take<float>(kTile * width);
    s.scores = arena.take<float>(kMaxRows * kTile);
    s.sums = arena.take<float>(kMaxRows * width);
    s.decay = arena.take<float>(kMaxRows);
    s.poison = arena.take<float>(kMaxRows);
    s.ones = arena.take<float>(kTile);
    return arena.used;
}

size_t scratch_bytes(const kvc_latent_attend_args& args) {
    Scratch unused{};
    return lay_out(args, nullptr, unused);
}

int width(const kvc_latent_attend_args& args) { return args.rank; }

KVC_INLINE int64_t query_token(const kvc_latent_attend_args& args, const Item& item, int row) {
    return args.batch.query_starts[item.request] + item.first_token + row / item.group;
}

KVC_INLINE const char* element_at(const kvc_latent_pages& pages, int64_t block, int64_t offset) {
    return static_cast<const char*>(pages.data) +
           (block * pages.block_stride + offset * pages.token_stride) * (pages.dtype == KVC_FLOAT32 ? 4 : 2);
}

inline void attend_tile(const kvc_latent_attend_args& args, const Item& item, int start, int tokens,
                        const Partial& partial, const Scratch& s) {
    const kvc_latent_pages& pages = args.pages;
    const int channels = round_up(pages.channels, 16), width = dense_width(pages.channels), rows = item.rows();
    const int32_t* blocks = args.batch.block_table + item.request * args.batch.block_table_stride;
    for (int group = 0; group < tokens; group += kGroup) {
        float* tile = s.tile + group * width;
        for (int i = 0; i < min_of(tokens - group, kGroup); ++i) {
            const int token = start + group + i;
            convert_row(element_at(pages, blocks[token / pages.block_size], token % pages.block_size), pages.dtype,
                        pages.channels, tile + i * width);
        }
        score_group_dense(s.query, width, rows, tile, width, channels, s.scores + group);
    }
    const int queries = args.batch.query_starts[item.request + 1] - args.batch.query_starts[item.request];
    const int before = args.batch.seq_lens[item.request] - queries + item.first_token;
    for (int row = 0; row < rows; ++row) {
        float largest, weight_sum;
        const int seen = min_of(before + row / item.group + 1 - start, tokens);
        s.decay[row] = soften(s.scores + row * kTile, s.ones, s.ones, seen, partial.max[row], partial.sum[row], largest,
                              weight_sum);
    }
    mix_dense(s.scores, s.decay, rows, s.tile, width, tokens, args.rank, s.sums, width);
}

void attend(const kvc_latent_attend_args& args, const Item& item, int start, int stop, const Partial& partial,
            void* scratch) {
    Scratch s{};
    lay_out(args, static_cast<char*>(scratch), s);
    const int channels = args.pages.channels, width = dense_width(channels), rows = item.rows();
    for (int i = 0; i < kTile; ++i) s.ones[i] = 1;
    for (int row = 0; row < rows; ++row) {
        float* query = s.query + row * width;
        convert_row(row_at(args.query, query_token(args, item, row), item.first_group + row % item.group),
                    args.query.dtype, channels, query);
        s.poison[row] = 0;
        for (int c = 0; c < channels; ++c) {
            query[c] *= args.batch.softmax_scale;
            s.poison[row] += query[c] * 0.f;
        }
        partial.max[row] = -__builtin_inff();
        partial.sum[row] = 0;
    }
    std::memset(s.sums, 0, sizeof(float) * static_cast<size_t>(rows * width));
    for (int tile = start; tile < stop; tile += kTile)
        attend_tile(args, item, tile, min_of(stop - tile, kTile), partial, s);
    for (int row = 0; row < rows; ++row) {
        partial.sum[row] += s.poison[row];  // the softmax's comparisons would hide it
        std::memcpy(partial.latent + row * args.rank, s.sums + row * width,
                    sizeof(float) * static_cast<size_t>(args.rank));
    }
}

void merge(const kvc_latent_attend_args& args, const Item& item, const Partial& into, const Partial& from) {
    merge_rows(item.rows(), args.rank, into, from);
}

void finish(const kvc_latent_attend_args& args, const Item& item, const Partial& partial, void*) {
    for (int row = 0; row < item.rows(); ++row) {
        float* latent = partial.latent + row * args.rank;
        for (int c = 0; c < args.rank; ++c) latent[c] /= partial.sum[row];
        store_row(args.output, query_token(args, item, row), item.first_group + row % item.group, args.rank, latent);
    }
}

void append(const kvc_latent_append_args& args, int64_t token) {
    const kvc_latent_pages& pages = args.pages;
    const int64_t slot = args.slots[token];
    if (slot < 0) return;
    auto* target = const_cast<char*>(element_at(pages, slot / pages.block_size, slot % pages.block_size));
    const void* source = row_at(args.keys, token, 0);
    if (args.keys.dtype == pages.dtype) {
        std::memcpy(target, source, static_cast<size_t>(pages.channels) * (pages.dtype == KVC_FLOAT32 ? 4 : 2));
        return;
    }
    float chunk[16];
    for (int c = 0; c < pages.channels; c += 16) {
        const int count = min_of(pages.channels - c, 16);
        convert_row(static_cast<const char*>(source) + c * (args.keys.dtype == KVC_FLOAT32 ? 4 : 2), args.keys.dtype,
                    count, chunk);
        const kvc_rows part{target + c * (pages.dtype == KVC_FLOAT32 ? 4 : 2), 0, 0, pages.dtype};
        store_row(part, 0, 0, count, chunk);
    }
}

}  // namespace latent
}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
