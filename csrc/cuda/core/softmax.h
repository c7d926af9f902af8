// The running softmax of a lane's two rows over 64 tokens at a time.
#pragma once

#include "cuda/core/rows.h"

namespace kvcompress::cuda {

struct RunningSoftmax {
    float largest[2] = {kLowest, kLowest};
    float sum[2] = {0, 0};  // of the lane's own tokens only, until `finish`

    // Scores s to weights; `factor` makes them powers of two. What was mixed before must be multiplied by decay.
    KVC_DEVICE void take(float (&s)[4][4], float2 factor, float (&decay)[2]) {
        const float factors[2] = {factor.x, factor.y};
        KVC_UNROLL
        for (int e = 0; e < 2; ++e) {
            float top = largest[e];
            KVC_UNROLL
            for (int f = 0; f < 4; ++f) top = fmaxf(top, fmaxf(s[f][e], s[f][2 + e]));
            KVC_UNROLL
            for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
            decay[e] = exp2_of((largest[e] - top) * factors[e]);
            largest[e] = top;
            sum[e] *= decay[e];
            const float shift = top * factors[e];
            KVC_UNROLL
            for (int f = 0; f < 4; ++f) {
                s[f][e] = exp2_of(s[f][e] * factors[e] - shift),
                s[f][2 + e] = exp2_of(s[f][2 + e] * factors[e] - shift);
                sum[e] += s[f][e] + s[f][2 + e];
            }
        }
    }

    KVC_DEVICE void finish() {
        KVC_UNROLL
        for (int e = 0; e < 2; ++e) KVC_UNROLL
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[e] += shuffle_xor(sum[e], lanes);
    }
};

}  // namespace kvcompress::cuda
