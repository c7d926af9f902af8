// Codes of a block against a tile's queries and weights. A code stands for code * scale + zero, with a scale and a zero
// for each group of tokens of a key channel, and for each group of channels of a value:
//
//     key scores      sum_c (q_c scale_c) code_tc + sum_c q_c zero_c        folded into the query once per group of tokens
//     value sums      sum_t (p_t scale_t) code_tc + sum_t p_t zero_t        folded into the weights, per group of channels
//
// in integers where the level has them (integer_side.h), else in float32 (float_side.h).
#pragma once

#include "cpu/blocks/side.h"
#include "cpu/core/float_side.h"
#include "cpu/core/integer_side.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

#if KVC_LEVEL_NUMBER >= 3

typedef uint8_t KeyCode;
typedef uint8_t ValueCode;

KVC_INLINE int key_code_width(const kvc_blocks_side& side) {
    return 4 * key_quads(band_of(side, side.rank));
}  // per token
KVC_INLINE int value_code_width(const kvc_side& band) { return value_positions(band); }
constexpr int kValueUnit = 4;  // ValueCodes of one position that stand together

// Where a tile's sixteen tokens of a group are.
KVC_INLINE uint8_t* key_group(uint8_t* keys, int group, int width) { return keys + group * kGroup * width; }

KVC_INLINE void unpack_block_keys(const kvc_side& band, const uint8_t* codes, uint8_t* out) {
    unpack_keys_integer(band, codes, out);
}

// Sixteen channels in the order of their quads.
KVC_INLINE __m512 by_quad(__m512 channels, int bits) {
    if (bits == 8) return channels;
    const __m512i order = bits == 4 ? _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                    : _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, channels);
}

// The order of channels in which queries, scales and zeros are folded.
KVC_INLINE void fold_order(const kvc_blocks_side& side, float* channels) {
    for (int c = 0; c < side.rank; c += 16)
        _mm512_store_ps(channels + c, by_quad(_mm512_load_ps(channels + c), side.bits));
}

struct Folded {
    float scale;
    float constant;
};

KVC_INLINE size_t folded_bytes(const kvc_blocks_side& side) {
    return static_cast<size_t>(padded_rank(side) / 4 * kFactorBytes);
}

// Queries of all rows with a group's scales, as digits [quad][row]; queries, scales and zeros in fold order.
inline void fold_queries(const kvc_blocks_side& side, const float* queries, int rows, const float* scale,
                         const float* zero, Folded* folded, uint8_t* factors) {
    constexpr float kLargest = 8355000.f;  // 127 * 65536 + 127 * 256 + 127, less the rounding of the scale
    const int width = padded_rank(side), step = rows * kFactorBytes;
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i bias = _mm512_set1_epi32(0x8080);
    for (int row = 0; row < rows; ++row, queries += width) {
        __m512 largest = _mm512_setzero_ps(), constant = _mm512_setzero_ps();
        for (int c = 0; c < width; c += 16) {
            const __m512 query = _mm512_load_ps(queries + c);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_mul_ps(query, _mm512_load_ps(scale + c))));
            constant = _mm512_fmadd_ps(query, _mm512_load_ps(zero + c), constant);
        }
        const float top = _mm512_reduce_max_ps(largest);
        const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? kLargest / top : 0.f);
        folded[row] = {top / kLargest, _mm512_reduce_add_ps(constant)};
        uint8_t* target = factors + row * kFactorBytes;
        for (int c = 0; c < width; c += 16, target += 4 * step) {
            const __m512 product = _mm512_mul_ps(_mm512_load_ps(queries + c), _mm512_load_ps(scale + c));
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(product, inverse));
            const __m512i digits = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(value, bias), bias), by_digit);
            _mm_store_si128(reinterpret_cast<__m128i*>(target), _mm512_castsi512_si128(digits));
            _mm_store_si128(reinterpret_cast<__m128i*>(target + step), _mm512_extracti32x4_epi32(digits, 1));
            _mm_store_si128(reinterpret_cast<__m128i*>(target + 2 * step), _mm512_extracti32x4_epi32(digits, 2));
            _mm_store_si128(reinterpret_cast<__m128i*>(target + 3 * step), _mm512_extracti32x4_epi32(digits, 3));
        }
    }
}

template <int ROWS, int GROUPS>
KVC_INLINE void score_folded(const Folded* folded, const uint8_t* factors, int step, const uint8_t* keys, int quads,
                             int groups, float* score, Ahead& ahead) {
    for (int group = 0; group < groups; group += GROUPS) {
        __m512i sums[ROWS][kDigits][GROUPS];
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kDigits>([&](auto d) KVC_LAMBDA {
                repeat<GROUPS>([&](auto g) KVC_LAMBDA { sums[row][d][g] = _mm512_setzero_si512(); });
            });
        });
        accumulate<ROWS, GROUPS, false>(sums, keys + group * quads * 64, quads * 64, 64, factors, step, quads, ahead);
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            const __m512 scale = _mm512_set1_ps(folded[row].scale), constant = _mm512_set1_ps(folded[row].constant);
            repeat<GROUPS>([&](auto g) KVC_LAMBDA {
                const __m512 sum = digits_to_float(sums[row][0][g], sums[row][1][g], sums[row][2][g]);
                _mm512_store_ps(score + row * kTile + (group + g) * kGroup, _mm512_fmadd_ps(sum, scale, constant));
            });
        });
    }
}

template <int GROUPS>
inline void score_groups(const Folded* folded, const uint8_t* factors, int rows, const uint8_t* keys, int quads,
                         int groups, float* score, Ahead& ahead) {
    const int step = rows * kFactorBytes;
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_folded<4, GROUPS>(folded + row, factors + row * kFactorBytes, step, keys, quads, groups,
                                score + row * kTile, ahead);
    for (; row < rows; ++row)
        score_folded<1, GROUPS>(folded + row, factors + row * kFactorBytes, step, keys, quads, groups,
                                score + row * kTile, ahead);
}

// Scores of `groups` groups of sixteen tokens that share their scales; overwrites no others.
inline void score_codes(const kvc_blocks_side& side, const Folded* folded, const uint8_t* factors, int rows,
                        const uint8_t* keys, int groups, float*, float* score, Ahead& ahead) {
    const int quads = key_code_width(side) / 4;
    if (groups % 2 == 0)
        score_groups<2>(folded, factors, rows, keys, quads, groups, score, ahead);
    else
        score_groups<1>(folded, factors, rows, keys, quads, groups, score, ahead);
}

// Sixteen tokens' codes of one group of channels.
KVC_INLINE void unpack_block_values(const kvc_side& band, const uint8_t* codes, int positions, uint8_t* out) {
    for (int quad = 0; quad < kGroup / 4; ++quad)
        unpack_values_integer(band, codes + 4 * quad * band.code_bytes, out + 4 * quad * positions);
}

struct MixScratch {
    uint8_t* digits;  // [tile / 4][rows][digits]
    TileWeights* headers;
    float* weights;  // [rows][tile]
};

// Adds one group of channels to `sums`, which have room for all of a row's `positions`; `values` has `tokens` of them.
inline void mix_codes(const kvc_side& band, const MixScratch& scratch, const float* weights, const float* decay,
                      int rows, const float* scale, const float* zero, const uint8_t* values, int tokens, int positions,
                      float* sums, Ahead& ahead) {
    const __m512 centre = _mm512_set1_ps(static_cast<float>(1 << (band.bits[0] - 1)));
    for (int row = 0; row < rows; ++row) {
        __m512 largest = _mm512_setzero_ps(), constant = _mm512_setzero_ps();
        for (int t = 0; t < kTile; t += 16) {
            const __m512 p = _mm512_load_ps(weights + row * kTile + t), step = _mm512_load_ps(scale + t);
            const __m512 weight = _mm512_mul_ps(p, step);
            largest = _mm512_max_ps(largest, weight);
            constant = _mm512_fmadd_ps(p, _mm512_fmadd_ps(step, centre, _mm512_load_ps(zero + t)), constant);
            _mm512_store_ps(scratch.weights + t, weight);
        }
        const float unit = integer_weights(scratch.weights, _mm512_reduce_max_ps(largest),
                                           scratch.digits + row * kFactorBytes, rows * kFactorBytes);
        scratch.headers[row] = {decay[row], unit, _mm512_reduce_add_ps(constant)};
    }
    mix_tile_integer(scratch.headers, scratch.digits, rows, values, tokens / 4, positions, value_positions(band), sums,
                     ahead);
}

KVC_INLINE void block_channels(const kvc_side& band, const float* at_position, float* latent) {
    value_channels_integer(band, at_position, latent);
}

#else

struct Ahead {};

typedef float KeyCode;
typedef float ValueCode;

KVC_INLINE int key_code_width(const kvc_blocks_side& side) { return key_positions(band_of(side, side.rank)); }
KVC_INLINE int value_code_width(const kvc_side& band) { return float_positions(band); }
constexpr int kValueUnit = 1;

KVC_INLINE float* key_group(float* keys, int group, int) { return keys + group * kGroup; }

KVC_INLINE void unpack_block_keys(const kvc_side& band, const uint8_t* codes, float* out) {
    unpack_keys(band, codes, out);
}

KVC_INLINE void fold_order(const kvc_blocks_side&, float*) {}

struct Folded {
    float constant;
};

KVC_INLINE size_t folded_bytes(const kvc_blocks_side& side) {
    return sizeof(float) * static_cast<size_t>(padded_rank(side));
}

inline void fold_queries(const kvc_blocks_side& side, const float* queries, int rows, const float* scale,
                         const float* zero, Folded* folded, uint8_t* factors) {
    const int width = padded_rank(side);
    const float middle = middle_of(side.bits);
    auto* target = reinterpret_cast<float*>(factors);
    for (int row = 0; row < rows; ++row, queries += width, target += width) {
        VecF constant = {};
        for (int c = 0; c < width; c += kLanes) {
            const VecF query = load(queries + c), step = load(scale + c);
            store(target + c, query * step);
            constant += query * (load(zero + c) + step * middle);
        }
        folded[row].constant = sum(constant);
    }
}

inline void score_codes(const kvc_blocks_side& side, const Folded* folded, const uint8_t* factors, int rows,
                        const float* keys, int groups, float* whole, float* score, Ahead&) {
    // Takes whole vectors of tokens, which would reach into the next row.
    const int tokens = groups * kGroup;
    score_tile(reinterpret_cast<const float*>(factors), padded_rank(side), rows, keys, key_code_width(side), tokens,
               whole);
    for (int row = 0; row < rows; ++row)
        for (int t = 0; t < tokens; t += kLanes)
            store(score + row * kTile + t, load(whole + row * kTile + t) + folded[row].constant);
}

KVC_INLINE void unpack_block_values(const kvc_side& band, const uint8_t* codes, int positions, float* out) {
    for (int i = 0; i < kGroup; ++i) unpack_value(band, codes + i * band.code_bytes, out + i * positions);
}

struct MixScratch {
    float* weights;  // [rows][tile]
};

inline void mix_codes(const kvc_side& band, const MixScratch& scratch, const float* weights, const float* decay,
                      int rows, const float* scale, const float* zero, const float* values, int tokens, int positions,
                      float* sums, Ahead&) {
    const int count = float_positions(band);
    const float middle = middle_of(band.bits[0]);
    float constants[kMaxRows];
    for (int row = 0; row < rows; ++row) {
        VecF constant = {};
        for (int t = 0; t < kTile; t += kLanes) {
            const VecF p = load(weights + row * kTile + t), step = load(scale + t);
            store(scratch.weights + row * kTile + t, p * step);
            constant += p * (load(zero + t) + step * middle);
        }
        constants[row] = sum(constant);
    }
    mix_tile(scratch.weights, decay, rows, values, tokens, positions, count, sums);
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < count; i += kLanes)
            store(sums + row * positions + i, load(sums + row * positions + i) + constants[row]);
}

KVC_INLINE void block_channels(const kvc_side& band, const float* at_position, float* latent) {
    value_channels(band, at_position, latent);
}

#endif

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
