// Values of a block, D + A B^T + S, mixed with eight rows of weights p: as for keys, with p scale in place of u scale,
// where a scale belongs to a token and a column of channels. The residual's share is (p A) B^T.
#pragma once

#include "cuda/blocks/keys.h"

namespace kvcompress::cuda {

// Eight channels of two tokens, in the order of unpack_words: a pair has the two tokens' codes of one channel.
template <int BITS>
KVC_DEVICE void load_token_pairs(const uint8_t* one, const uint8_t* other, uint32_t (&pair)[kPairs]) {
    uint32_t words[BITS / 2];
    if constexpr (BITS == 2) {
        words[0] = *reinterpret_cast<const uint16_t*>(one) |
                   static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(other)) << 16;
    } else {
        uint32_t a[BITS / 4], b[BITS / 4];
        load_words<BITS / 2>(one, a);
        load_words<BITS / 2>(other, b);
        KVC_UNROLL
        for (int i = 0; i < BITS / 4; ++i)
            words[2 * i] = bytes_of<0x5410>(a[i], b[i]), words[2 * i + 1] = bytes_of<0x7632>(a[i], b[i]);
    }
    unpack_words<BITS>(words, pair);
}

// A^T p as a second operand, whose depth is factors.
KVC_DEVICE uint32_t project_weights(const BlockSide& side, const uint8_t* part, const uint32_t (&p)[4][2], int lane) {
    const int g = lane / 4, t = lane % 4, r = side.low_rank;
    const auto* factors = reinterpret_cast<const uint16_t*>(part + side.token_offset);
    float sums[4] = {};
    KVC_UNROLL
    for (int f = 0; f < 4; ++f) {
        const uint16_t* at = factors + (16 * f + t) * r + g;
        const uint32_t low = g < r ? two_halves(at, kApart * r) : 0,
                       high = g < r ? two_halves(at + 8 * r, kApart * r) : 0;
        mma(sums, low, 0, high, 0, p[f]);
    }
    return transpose(halves_of(sums[0], sums[1]));
}

// The weights of tokens 16 f + ... as the second operand: o[column][n] grows by the mix of channels 64 column + 8 g + 2 n
// (rows 2 t, 2 t + 1) and the ones after them.
template <int BITS>
KVC_DEVICE void mix_block(const BlockSide& side, const uint8_t* part, const uint32_t (&p)[4][2], Sparse& sparse,
                          int lane, float decay0, float decay1, float (&o)[kMaxColumns][4][4]) {
    const int g = lane / 4, t = lane % 4, row_bytes = side.rank * BITS / 8;
    const uint32_t low[2] = {side.low_rank ? project_weights(side, part, p, lane) : 0, 0};
    if (side.outliers) sparse.read<false>(side, part);
    KVC_UNROLL
    for (int column = 0; column < kMaxColumns; ++column) {
        if (kColumn * column >= side.rank) break;
        const int channel = kColumn * column + 8 * g;  // the lane's first
        const int group = side.groups == 1 ? 0 : column;
        const auto* scales = reinterpret_cast<const uint16_t*>(part + side.scale_offset) + group;
        const auto* zeros = reinterpret_cast<const uint16_t*>(part + side.zero_offset) + group;
        float share[4] = {}, total[4] = {};
        uint32_t folded[4][2];
        const uint32_t ones = halves_of(1, 1);
        KVC_UNROLL
        for (int f = 0; f < 4; ++f) {
            const int at = (16 * f + t) * side.groups, later = at + 8 * side.groups;
            const uint32_t scale0 = two_halves(scales + at, kApart * side.groups),
                           scale1 = two_halves(scales + later, kApart * side.groups);
            const uint32_t zero0 = two_halves(zeros + at, kApart * side.groups),
                           zero1 = two_halves(zeros + later, kApart * side.groups);
            mma(share, zero0, scale0, zero1, scale1, p[f]);
            folded[f][0] = halves_times(p[f][0], scale0), folded[f][1] = halves_times(p[f][1], scale1);
            mma(total, ones, ones, ones, ones, folded[f]);
        }
        const float start0 = share[0] + middle(BITS) * share[2], start1 = share[1] + middle(BITS) * share[3];
        float sum[4][4];
        KVC_UNROLL
        for (int n = 0; n < 4; ++n) {
            const float first = pair_offset<BITS>(2 * n) + middle(BITS),
                        second = pair_offset<BITS>(2 * n + 1) + middle(BITS);
            sum[n][0] = start0 - first * total[0], sum[n][1] = start1 - first * total[1];
            sum[n][2] = start0 - second * total[0], sum[n][3] = start1 - second * total[1];
        }
        KVC_UNROLL
        for (int f = 0; f < 4; ++f) {
            // Past the last channel this reads something else, for sums that nobody reads.
            uint32_t first[kPairs], second[kPairs];
            const uint8_t* codes = part + (16 * f + t) * row_bytes + channel * BITS / 8;
            load_token_pairs<BITS>(codes, codes + kApart * row_bytes, first);
            load_token_pairs<BITS>(codes + 8 * row_bytes, codes + (8 + kApart) * row_bytes, second);
            KVC_UNROLL
            for (int n = 0; n < 4; ++n)
                mma(sum[n], first[2 * n], first[2 * n + 1], second[2 * n], second[2 * n + 1], folded[f]);
        }
        if (side.low_rank) {
            const auto* factors = reinterpret_cast<const uint16_t*>(part + side.channel_offset);
            const int r = channel < side.rank ? side.low_rank : 0;
            KVC_UNROLL
            for (int n = 0; n < 4; ++n) {
                const uint16_t* at = factors + (channel + 2 * n) * side.low_rank;
                mma(sum[n], factor_pair(at, t, r), factor_pair(at + side.low_rank, t, r), 0, 0, low);
            }
        }
        if (side.outliers) {
            sparse.put(column);
            KVC_UNROLL
            for (int n = 0; n < 4; ++n) KVC_UNROLL
            for (int f = 0; f < 4; ++f) {
                const uint4 a = sparse.load(f, n);
                mma(sum[n], a.x, a.y, a.z, a.w, p[f]);
            }
            sparse.take(column);
        }
        KVC_UNROLL
        for (int n = 0; n < 4; ++n) {
            o[column][n][0] = o[column][n][0] * decay0 + sum[n][0],
            o[column][n][1] = o[column][n][1] * decay1 + sum[n][1];
            o[column][n][2] = o[column][n][2] * decay0 + sum[n][2],
            o[column][n][3] = o[column][n][3] * decay1 + sum[n][3];
        }
    }
}

}  // namespace kvcompress::cuda
