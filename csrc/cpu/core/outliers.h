// Channels stored exactly: what their codes leave of them, added to scores and sums beside the codes' own share.
//
// Rows are taken four at a time, side by side: one outlier then is one load of four query entries, or of four sums.
#pragma once

#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

typedef float Vec4 __attribute__((vector_size(16), may_alias));

KVC_INLINE Vec4 load4(const float* p) {
    Vec4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
KVC_INLINE void store4(float* p, Vec4 v) { std::memcpy(p, &v, sizeof v); }

KVC_INLINE void transpose4(Vec4 (&v)[4]) {
#if KVC_LEVEL_NUMBER >= 1
    __m128 a = v[0], b = v[1], c = v[2], d = v[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
#else
    const Vec4 a = v[0], b = v[1], c = v[2], d = v[3];
    for (int i = 0; i < 4; ++i) v[i] = Vec4{a[i], b[i], c[i], d[i]};
#endif
}

// Where row `row` of channel 0 is in a matrix [rows / 4][channels][4].
KVC_INLINE int64_t at_row(int row, int channels) { return static_cast<int64_t>(row / 4 * 4) * channels + row % 4; }

// A tile's outliers. `left` is divided by the token's gain, because scores and weights are in units of it where outliers
// are added; 0 for tokens past the end, whose gain is 0.
struct Outliers {
    alignas(kAlign) float left[KVC_MAX_OUTLIERS][kTile];
    alignas(kAlign) int32_t channel[KVC_MAX_OUTLIERS][kTile];
};

// A group of sixteen tokens.
inline void read_outliers(const kvc_side& side, const uint8_t* record, int offset, const float* gains, int group,
                          Outliers& out) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    const uint8_t* halves = record + side.outlier_offset + 2 * side.outliers * offset;
    const uint8_t* channels = record + side.channel_offset + side.outliers * offset;
    for (int i = 0; i < kGroup; i += kLanes) {
        VecU half[KVC_MAX_OUTLIERS], number[KVC_MAX_OUTLIERS];
        if (side.outliers == 1) {
            Halves narrow;
            Bytes bytes;
            std::memcpy(&narrow, halves + 2 * i, sizeof narrow);
            std::memcpy(&bytes, channels + i, sizeof bytes);
            half[0] = __builtin_convertvector(narrow, VecU);
            number[0] = __builtin_convertvector(bytes, VecU);
        } else {
            VecU pairs;
            Halves narrow;
            std::memcpy(&pairs, halves + 4 * i, sizeof pairs);
            std::memcpy(&narrow, channels + 2 * i, sizeof narrow);
            const VecU both = __builtin_convertvector(narrow, VecU);
            half[0] = pairs & 0xffffu, half[1] = pairs >> 16;
            number[0] = both & 0xffu, number[1] = both >> 8;
        }
        const VecF gain = load(gains + i);
        for (int n = 0; n < side.outliers; ++n) {
            const VecI channel = reinterpret_cast<const VecI&>(number[n]);
            // Damaged pages must not become writes outside the sums.
            const VecI used = (gain > 0.f) & (channel < side.rank);
            store(out.left[n] + group * kGroup + i, used ? half_to_float(half[n]) / gain : VecF{});
            const VecI inside = used ? channel : VecI{};
            std::memcpy(out.channel[n] + group * kGroup + i, &inside, sizeof inside);
        }
    }
}

// score[row][token] += query[row][channel] * left; queries are [rows / 4][channels][4].
template <int COUNT>
KVC_INLINE void score_outliers(const Outliers& outliers, const float* queries, int rank, int rows, int tokens,
                               float* scores) {
    for (int row = 0; row < rows; row += 4, queries += 4 * rank, scores += 4 * kTile)
        for (int token = 0; token < tokens; token += 4) {
            Vec4 sums[4] = {};
            repeat<4>([&](auto t) KVC_LAMBDA {
                repeat<COUNT>([&](auto n) KVC_LAMBDA {
                    sums[t] += load4(queries + 4 * outliers.channel[n][token + t]) * outliers.left[n][token + t];
                });
            });
            transpose4(sums);
            repeat<4>([&](auto r) KVC_LAMBDA {
                float* target = scores + r * kTile + token;
                store4(target, load4(target) + sums[r]);
            });
        }
}

inline void score_outliers(const kvc_side& side, const Outliers& outliers, const float* queries, int rows, int tokens,
                           float* scores) {
    if (side.outliers == 1)
        score_outliers<1>(outliers, queries, side.rank, rows, tokens, scores);
    else
        score_outliers<2>(outliers, queries, side.rank, rows, tokens, scores);
}

// exact[row][channel] = exact * decay[row] + weight[row][token] * left; exact is [rows / 4][channels][4].
inline void mix_outliers(const kvc_side& side, const Outliers& outliers, const float* weights, const float* decay,
                         int rows, int tokens, float* exact) {
    for (int row = 0; row < rows; row += 4, exact += 4 * side.rank, weights += 4 * kTile, decay += 4) {
        const Vec4 factor = load4(decay);
        if (factor[0] != 1 || factor[1] != 1 || factor[2] != 1 || factor[3] != 1)
            for (int c = 0; c < side.rank; ++c) store4(exact + 4 * c, load4(exact + 4 * c) * factor);
        for (int token = 0; token < tokens; token += 4) {
            Vec4 weight[4];
            repeat<4>([&](auto r) KVC_LAMBDA { weight[r] = load4(weights + r * kTile + token); });
            transpose4(weight);
            for (int n = 0; n < side.outliers; ++n)
                repeat<4>([&](auto t) KVC_LAMBDA {
                    float* target = exact + 4 * outliers.channel[n][token + t];
                    store4(target, load4(target) + weight[t] * outliers.left[n][token + t]);
                });
        }
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
