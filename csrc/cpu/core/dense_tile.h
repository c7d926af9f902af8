// A tile of tokens as float32 rows [tile][width], channels contiguous, for many query rows: what has no codes to fold a
// scale into (MLA latents, a step's own tokens), and latents that all query heads share.
#pragma once

#include "cpu/core/float_side.h"
#include "cpu/core/half_side.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// Floats between rows: whole vectors of 16, an odd number of them, so that a column of the tile meets every cache set.
constexpr int dense_width(int channels) { return (round_up(channels, 16) / 16 | 1) * 16; }

// A row of numbers to floats, zeros up to a whole vector of 16.
inline void convert_row(const void* source, int dtype, int channels, float* out) {
    int i = 0;
    if (dtype == KVC_FLOAT32) {
        std::memcpy(out, source, sizeof(float) * static_cast<size_t>(channels));
        i = channels;
    } else {
        const auto* numbers = static_cast<const uint16_t*>(source);
        if (dtype == KVC_BFLOAT16) {
            typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
            for (; i + kLanes <= channels; i += kLanes) {
                Narrow narrow;
                std::memcpy(&narrow, numbers + i, sizeof narrow);
                store(out + i, bits_to_float(__builtin_convertvector(narrow, VecU) << 16));
            }
        }
#if KVC_LEVEL_NUMBER >= 1
        if (dtype == KVC_FLOAT16)
            for (; i + kLanes <= channels; i += kLanes)
                store(out + i, load_halves(reinterpret_cast<const uint8_t*>(numbers + i)));
#endif
        for (; i < channels; ++i) {
            if (dtype == KVC_BFLOAT16) {
                const uint32_t bits = static_cast<uint32_t>(numbers[i]) << 16;
                std::memcpy(out + i, &bits, 4);
            } else {
                out[i] = half_to_float(numbers[i]);
            }
        }
    }
    for (; i < round_up(channels, 16); ++i) out[i] = 0;
}

// Sixteen tokens' scores from their vectors of products.
KVC_INLINE void sum_products(const float (&products)[kGroup][kLanes], float* score) {
#if KVC_LEVEL_NUMBER >= 1
    for (int token = 0; token < kGroup; token += kLanes) store(score + token, sums_of(products[token]));
#else
    for (int token = 0; token < kGroup; ++token) score[token] = sum(load(products[token]));
#endif
}

// score[row][16 tokens] = query[row] . tile[token]; queries are padded with zeros to whole vectors of 16.
template <int ROWS>
KVC_INLINE void score_rows_dense(const float* query, int query_stride, const float* tile, int width, int channels,
                                 float* score) {
    constexpr int kTokens = KVC_LANES == 16 ? 4 : 2;
    alignas(kAlign) float products[ROWS][kGroup][kLanes];
    for (int token = 0; token < kGroup; token += kTokens) {
        VecF sums[ROWS][kTokens];
        repeat<ROWS>([&](auto row) KVC_LAMBDA { repeat<kTokens>([&](auto t) KVC_LAMBDA { sums[row][t] = VecF{}; }); });
        for (int channel = 0; channel < channels; channel += kLanes) {
            VecF keys[kTokens];
            repeat<kTokens>([&](auto t) KVC_LAMBDA { keys[t] = load(tile + (token + t) * width + channel); });
            repeat<ROWS>([&](auto row) KVC_LAMBDA {
                const VecF factor = load(query + row * query_stride + channel);
                repeat<kTokens>([&](auto t) KVC_LAMBDA { sums[row][t] += keys[t] * factor; });
            });
        }
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kTokens>([&](auto t) KVC_LAMBDA { store(products[row][token + t], sums[row][t]); });
        });
    }
    repeat<ROWS>([&](auto row) KVC_LAMBDA { sum_products(products[row], score + row * kTile); });
}

// Sixteen tokens for all rows. Slots past the request's end may hold anything: their scores are not looked at.
inline void score_group_dense(const float* query, int query_stride, int rows, const float* tile, int width,
                              int channels, float* score) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows_dense<4>(query + row * query_stride, query_stride, tile, width, channels, score + row * kTile);
    for (; row < rows; ++row)
        score_rows_dense<1>(query + row * query_stride, query_stride, tile, width, channels, score + row * kTile);
}

// sums[row][channel] = sums * decay[row] + sum_token weight[row][token] tile[token][channel], for whole vectors of
// channels.
template <int ROWS, int VECTORS>
KVC_INLINE void mix_rows_dense(const float* weight, const float* decay, const float* tile, int width, int tokens,
                               float* sums, int sums_stride) {
    VecF acc[ROWS][VECTORS];
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n)
                            KVC_LAMBDA { acc[row][n] = load(sums + row * sums_stride + n * kLanes) * decay[row]; });
    });
    for (int token = 0; token < tokens; ++token) {
        VecF values[VECTORS];
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { values[n] = load(tile + token * width + n * kLanes); });
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            const float factor = weight[row * kTile + token];
            repeat<VECTORS>([&](auto n) KVC_LAMBDA { acc[row][n] += values[n] * factor; });
        });
    }
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { store(sums + row * sums_stride + n * kLanes, acc[row][n]); });
    });
}

template <int VECTORS>
KVC_INLINE void mix_columns_dense(const float* weight, const float* decay, int rows, const float* tile, int width,
                                  int tokens, float* sums, int sums_stride) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        mix_rows_dense<4, VECTORS>(weight + row * kTile, decay + row, tile, width, tokens, sums + row * sums_stride,
                                   sums_stride);
    for (; row < rows; ++row)
        mix_rows_dense<1, VECTORS>(weight + row * kTile, decay + row, tile, width, tokens, sums + row * sums_stride,
                                   sums_stride);
}

// Columns outside rows: a few columns of the whole tile stay in the first-level cache for all rows.
inline void mix_dense(const float* weight, const float* decay, int rows, const float* tile, int width, int tokens,
                      int channels, float* sums, int sums_stride) {
    int channel = 0;
    for (; channel + kBlock * kLanes <= channels; channel += kBlock * kLanes)
        mix_columns_dense<kBlock>(weight, decay, rows, tile + channel, width, tokens, sums + channel, sums_stride);
    for (; channel < channels; channel += kLanes)
        mix_columns_dense<1>(weight, decay, rows, tile + channel, width, tokens, sums + channel, sums_stride);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
