// Scores of eight rows on a block's keys, D + A B^T + S, none of which is formed:
//
//   u . D    a code c of a channel stands for c scale + zero. The tensor core multiplies OFFSET + c, halves made of
//            codes by logic operations, with u scale, rounded to halves; the share of OFFSET and of the middle code is
//            subtracted with the same rounded factors, and the share of zero + middle scale comes from exact products;
//   (u B) A  first w = u B, a few sums per row, then one product;
//   u . S    see block_sparse.h.
#pragma once

#include "cuda/blocks/sparse.h"

namespace kvcompress::cuda {

// One number for each of a lane's sixteen channels, in the pairs of their codes.
template <int BITS>
KVC_DEVICE void load_channels(const uint8_t* part, bool there, uint32_t (&pair)[kPairs]) {
    uint32_t words[8] = {};
    if (there) {
        const uint4 low = reinterpret_cast<const uint4*>(part)[0], high = reinterpret_cast<const uint4*>(part)[1];
        words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
        words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
    }
    KVC_UNROLL
    for (int n = 0; n < kPairs; ++n) {
        const uint32_t first = words[code_channel<BITS>(n, 0) / 2], second = words[code_channel<BITS>(n, 1) / 2];
        pair[n] = code_channel<BITS>(n, 0) % 2 ? bytes_of<0x7632>(first, second) : bytes_of<0x5410>(first, second);
    }
}

// w += B^T u over a column: row l of the result belongs to factor l.
KVC_DEVICE void project_queries(const BlockSide& side, const uint8_t* part, int column, const uint2* plain_query,
                                int lane, float (&w)[4]) {
    const int g = lane / 4, t = lane % 4, r = side.low_rank;
    const auto* factors = reinterpret_cast<const uint16_t*>(part + side.channel_offset);
    KVC_UNROLL
    for (int step = 0; step < 4; ++step) {
        const int channel = kColumn * column + 16 * step;
        if (channel >= side.rank) break;
        const uint16_t* at = factors + (channel + 2 * t) * r + g;
        const uint32_t low = g < r ? two_halves(at, r) : 0, high = g < r ? two_halves(at + 8 * r, r) : 0;
        const uint2 u = plain_query[32 * (4 * column + step) + lane];
        mma(w, low, 0, high, 0, {u.x, u.y});
    }
}

// Factors 2 t and 2 t + 1 of a token or channel; 0 where there are none.
KVC_DEVICE uint32_t factor_pair(const uint16_t* factors, int t, int count) {
    return 2 * t < count ? reinterpret_cast<const uint32_t*>(factors)[t] : 0;
}

// s += A w. B's entries may be as large as a half's, u's are below 1: w / 256 is in a half's range whatever they are. A's
// columns have length 1, so that 256 A is.
KVC_DEVICE void add_low_rank_scores(const BlockSide& side, const uint8_t* part, const float (&w)[4], int lane,
                                    float (&s)[4][4]) {
    const int g = lane / 4, t = lane % 4, r = side.low_rank;
    const uint32_t b[2] = {transpose(halves_of(w[0] / 256, w[1] / 256)), 0};
    const uint32_t up = halves_of(256, 256);
    const auto* factors = reinterpret_cast<const uint16_t*>(part + side.token_offset);
    KVC_UNROLL
    for (int f = 0; f < 4; ++f) {
        const uint16_t* at = factors + (16 * f + token_of(g)) * r;
        mma(s[f], halves_times(factor_pair(at, t, r), up), halves_times(factor_pair(at + 8 * r, t, r), up), 0, 0, b);
    }
}

// s[f] of tokens 16 f + token_of(g) (+ 8) and rows 2 t, 2 t + 1.
template <int BITS>
KVC_DEVICE void score_block(const BlockSide& side, const uint8_t* part, const uint2* code_query,
                            const uint2* plain_query, Sparse& sparse, int lane, float (&s)[4][4]) {
    const int g = lane / 4, t = lane % 4, row_bytes = side.rank * BITS / 8;
    float w[4] = {};
    KVC_UNROLL
    for (int f = 0; f < 4; ++f) s[f][0] = s[f][1] = s[f][2] = s[f][3] = 0;
    if (side.outliers) sparse.read<true>(side, part);
    KVC_ROLLED
    for (int column = 0; kColumn * column < side.rank; ++column) {
        const int channel = kColumn * column + 16 * t;  // the lane's first
        const bool there = channel < side.rank;
        uint32_t scale[kPairs], zero[kPairs], folded[4][2];
        load_channels<BITS>(part + side.scale_offset + 2 * channel, there, scale);
        load_channels<BITS>(part + side.zero_offset + 2 * channel, there, zero);
        float share[4] = {}, offset[4] = {};  // zeros' in the first eight rows, scales' in the others
        KVC_UNROLL
        for (int step = 0; step < 4; ++step) {
            const uint2 u = code_query[32 * (4 * column + step) + lane];
            folded[step][0] = halves_times(u.x, scale[2 * step]),
            folded[step][1] = halves_times(u.y, scale[2 * step + 1]);
            mma(share, zero[2 * step], scale[2 * step], zero[2 * step + 1], scale[2 * step + 1], {u.x, u.y});
        }
        subtract_offsets<BITS>(folded, offset);
        const float start0 = share[0] + middle(BITS) * share[2] + offset[0],
                    start1 = share[1] + middle(BITS) * share[3] + offset[1];
        KVC_UNROLL
        for (int f = 0; f < 4; ++f) {
            // Past the last channel this reads other codes or numbers, which then count nothing.
            uint32_t words[2][BITS / 2], first[kPairs], second[kPairs];
            const uint8_t* codes = part + (16 * f + token_of(g)) * row_bytes + channel * BITS / 8;
            load_words<BITS>(codes, words[0]);
            load_words<BITS>(codes + 8 * row_bytes, words[1]);
            unpack_words<BITS>(words[0], first);
            unpack_words<BITS>(words[1], second);
            s[f][0] += start0, s[f][1] += start1, s[f][2] += start0, s[f][3] += start1;
            KVC_UNROLL
            for (int step = 0; step < 4; ++step)
                mma(s[f], first[2 * step], second[2 * step], first[2 * step + 1], second[2 * step + 1], folded[step]);
        }
        if (side.low_rank) project_queries(side, part, column, plain_query, lane, w);
        if (!side.outliers) continue;
        sparse.put(column);
        KVC_UNROLL
        for (int step = 0; step < 4; ++step) {
            const uint2 u = plain_query[32 * (4 * column + step) + lane];
            KVC_UNROLL
            for (int f = 0; f < 4; ++f) {
                const uint4 a = sparse.load(f, step);
                mma(s[f], a.x, a.y, a.z, a.w, {u.x, u.y});
            }
        }
        sparse.take(column);
    }
    if (side.low_rank) add_low_rank_scores(side, part, w, lane, s);
}

}  // namespace kvcompress::cuda
