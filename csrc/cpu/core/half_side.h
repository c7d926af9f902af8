// One side of the cache in 16-bit channels, from AVX2 on: halves are converted as they are loaded, nothing is unpacked.
#pragma once

#include "cpu/core/vec.h"

#if KVC_LEVEL_NUMBER >= 1

#include <immintrin.h>

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

#if KVC_LANES == 16

// Sixteen vectors' sums.
KVC_INLINE VecF sums_of(const float* p) {
    __m512 a[8], b[4];
    repeat<8>([&](auto i) KVC_LAMBDA {
        const __m512 x = _mm512_load_ps(p + 32 * i), y = _mm512_load_ps(p + 32 * i + 16);
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    });
    repeat<4>([&](auto i) KVC_LAMBDA {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    });
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

#else

// Eight vectors' sums.
KVC_INLINE VecF sums_of(const float* p) {
    __m256 a[4], b[2];
    repeat<4>([&](auto i)
                  KVC_LAMBDA { a[i] = _mm256_hadd_ps(_mm256_load_ps(p + 16 * i), _mm256_load_ps(p + 16 * i + 8)); });
    repeat<2>([&](auto i) KVC_LAMBDA { b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]); });
    return _mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
}

#endif

// The channels of a row that fill no whole vector, zeros after them.
KVC_INLINE VecF load_last_halves(const uint8_t* p, int channels) {
    alignas(kAlign) uint8_t bytes[2 * kLanes] = {};
    std::memcpy(bytes, p, static_cast<size_t>(2 * channels));
    return load_halves(bytes);
}

// score[row][16 tokens] = query[row] . key[token]; queries are padded with zeros to whole vectors.
template <int ROWS>
KVC_INLINE void score_rows_half(const float* query, int query_stride, const uint8_t* codes, int64_t code_bytes,
                                int rank, float* score) {
    constexpr int kTokens = KVC_LANES == 16 ? 4 : 2;
    alignas(kAlign) float products[ROWS][kGroup][kLanes];
    for (int token = 0; token < kGroup; token += kTokens) {
        const uint8_t* row_bytes = codes + token * code_bytes;
        VecF sums[ROWS][kTokens];
        repeat<ROWS>([&](auto row) KVC_LAMBDA { repeat<kTokens>([&](auto t) KVC_LAMBDA { sums[row][t] = VecF{}; }); });
        int channel = 0;
        for (; channel + kLanes <= rank; channel += kLanes) {
            VecF keys[kTokens];
            repeat<kTokens>([&](auto t) KVC_LAMBDA {
                keys[t] = load_halves(row_bytes + t * code_bytes + 2 * channel);
                __builtin_prefetch(row_bytes + t * code_bytes + 2 * channel + kGroup * code_bytes);
            });
            repeat<ROWS>([&](auto row) KVC_LAMBDA {
                const VecF factor = load(query + row * query_stride + channel);
                repeat<kTokens>([&](auto t) KVC_LAMBDA { sums[row][t] += keys[t] * factor; });
            });
        }
        if (channel < rank)
            repeat<kTokens>([&](auto t) KVC_LAMBDA {
                const VecF key = load_last_halves(row_bytes + t * code_bytes + 2 * channel, rank - channel);
                repeat<ROWS>([&](auto row)
                                 KVC_LAMBDA { sums[row][t] += key * load(query + row * query_stride + channel); });
            });
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kTokens>([&](auto t) KVC_LAMBDA { store(products[row][token + t], sums[row][t]); });
        });
    }
    for (int row = 0; row < ROWS; ++row)
        for (int token = 0; token < kGroup; token += kLanes)
            store(score + row * kTile + token, sums_of(products[row][token]));
}

// Sixteen tokens for all rows.
inline void score_group_half(const float* query, int query_stride, int rows, const kvc_side& side, const uint8_t* codes,
                             float* score) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows_half<4>(query + row * query_stride, query_stride, codes, side.code_bytes, side.rank,
                           score + row * kTile);
    for (; row < rows; ++row)
        score_rows_half<1>(query + row * query_stride, query_stride, codes, side.code_bytes, side.rank,
                           score + row * kTile);
}

// sums[row][channel] = sums * decay[row] + sum_token weight[row][token] value[token][channel]
template <int ROWS, int VECTORS, bool LAST>
KVC_INLINE void mix_rows_half(const float* weight, const float* decay, const uint8_t* codes, int64_t code_bytes,
                              int tokens, int channels, int positions, float* sums) {
    VecF acc[ROWS][VECTORS];
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n)
                            KVC_LAMBDA { acc[row][n] = load(sums + row * positions + n * kLanes) * decay[row]; });
    });
    for (int token = 0; token < tokens; ++token) {
        const uint8_t* row_bytes = codes + token * code_bytes;
        VecF values[VECTORS];
        repeat<VECTORS>([&](auto n) KVC_LAMBDA {
            values[n] = LAST ? load_last_halves(row_bytes, channels) : load_halves(row_bytes + 2 * n * kLanes);
            __builtin_prefetch(row_bytes + 2 * n * kLanes + kGroup * code_bytes);
        });
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            const float factor = weight[row * kTile + token];
            repeat<VECTORS>([&](auto n) KVC_LAMBDA { acc[row][n] += values[n] * factor; });
        });
    }
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { store(sums + row * positions + n * kLanes, acc[row][n]); });
    });
}

template <int ROWS>
KVC_INLINE void mix_all_half(const float* weight, const float* decay, const kvc_side& side, const uint8_t* codes,
                             int tokens, int positions, float* sums) {
    constexpr int kBlock = KVC_LANES == 16 ? 4 : 2;
    int channel = 0;
    for (; channel + kBlock * kLanes <= side.rank; channel += kBlock * kLanes)
        mix_rows_half<ROWS, kBlock, false>(weight, decay, codes + 2 * channel, side.code_bytes, tokens, 0, positions,
                                           sums + channel);
    for (; channel + kLanes <= side.rank; channel += kLanes)
        mix_rows_half<ROWS, 1, false>(weight, decay, codes + 2 * channel, side.code_bytes, tokens, 0, positions,
                                      sums + channel);
    if (channel < side.rank)
        mix_rows_half<ROWS, 1, true>(weight, decay, codes + 2 * channel, side.code_bytes, tokens, side.rank - channel,
                                     positions, sums + channel);
}

// Up to sixteen tokens for all rows.
inline void mix_group_half(const float* weight, const float* decay, int rows, const kvc_side& side,
                           const uint8_t* codes, int tokens, int positions, float* sums) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        mix_all_half<4>(weight + row * kTile, decay + row, side, codes, tokens, positions, sums + row * positions);
    for (; row < rows; ++row)
        mix_all_half<1>(weight + row * kTile, decay + row, side, codes, tokens, positions, sums + row * positions);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL

#endif
