// The search for a token's gain, as kvcompress/codec/scalar.py specifies it, by one warp.
#pragma once

#include "cuda/core/codes.h"

namespace kvcompress::cuda {

constexpr int kEncodeThreads = 128;
constexpr int kMaxOutliers = KVC_MAX_OUTLIERS;
constexpr float kSmallestGain = 0x1p-14f, kHalfMax = 65504.f;

// A lane's channels of one token. Those that are not there have weight and latent 0, bits 0.
template <int COUNT>
struct Channels {
    float latent[COUNT], weight[COUNT], step[COUNT];
    int bits[COUNT];
};

// A latent as it is encoded.
KVC_DEVICE float finite(float x) {
    if (x != x) return 0;
    return fabsf(x) == INFINITY ? (x > 0 ? kHalfMax : -kHalfMax) : x;
}

// Takes the channels of the largest entries out of x, which stays as it is otherwise; of equal ones the first.
template <int COUNT>
KVC_DEVICE void take_largest(float (&x)[COUNT], int count, int lane, int (&channels)[kMaxOutliers]) {
    KVC_UNROLL
    for (int n = 0; n < kMaxOutliers; ++n) {
        if (n >= count) break;
        float largest = -1;
        int channel = 32 * COUNT;
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            if (x[i] > largest) largest = x[i], channel = 32 * i + lane;
        KVC_UNROLL
        for (int lanes = 16; lanes; lanes /= 2) {
            const float other = shuffle_xor(largest, lanes);
            const int others = shuffle_xor(channel, lanes);
            if (other > largest || (other == largest && others < channel)) largest = other, channel = others;
        }
        channels[n] = channel;
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i)
            if (channel == 32 * i + lane) x[i] = -2;
    }
}

KVC_DEVICE bool is_taken(const int (&channels)[kMaxOutliers], int count, int channel) {
    bool taken = false;
    KVC_UNROLL
    for (int n = 0; n < kMaxOutliers; ++n) taken |= n < count && channels[n] == channel;
    return taken;
}

// The gain, and the channels that are stored exactly, which are numbered 32 i + lane.
template <int COUNT>
KVC_DEVICE float best_gain(int rank, int outliers, const Channels<COUNT>& x, int lane, int (&exact)[kMaxOutliers]) {
    float square[COUNT];
    KVC_UNROLL
    for (int i = 0; i < COUNT; ++i) square[i] = x.bits[i] ? x.latent[i] * x.latent[i] : -2;
    take_largest(square, outliers, lane, exact);
    float rest = 0;
    KVC_UNROLL
    for (int i = 0; i < COUNT; ++i) rest += fmaxf(square[i], 0.f);
    const float rms = fmaxf(sqrtf(sum_lanes(rest) / static_cast<float>(rank - outliers)), kSmallestGain);
    float best = rms, best_error = INFINITY;
    // 2^(n / 3), n = -3 ... 6: multiples of the root mean square tried as gain.
    KVC_ROLLED
    for (int n = -3; n <= 6; ++n) {
        const int third = (n + 3) % 3;
        const float root = third == 0 ? 1.f : third == 1 ? 1.25992105f : 1.58740105f;
        const float candidate = rms * (root * (n < 0 ? 0.5f : n < 3 ? 1.f : n < 6 ? 2.f : 4.f));
        float value[COUNT], miss[COUNT];
        int found[kMaxOutliers] = {};
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            value[i] = x.bits[i]
                           ? value_of(nearest_code(x.latent[i], candidate, x.step[i], x.bits[i]), x.step[i], x.bits[i])
                           : 0;
            const float left = x.latent[i] - candidate * value[i];
            miss[i] = x.bits[i] ? x.weight[i] * (left * left) : -2;
        }
        take_largest(miss, outliers, lane, found);
        float energy = 0, product = 0;
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            if (is_taken(found, outliers, 32 * i + lane)) continue;
            energy += x.weight[i] * (value[i] * value[i]);
            product += x.weight[i] * value[i] * x.latent[i];
        }
        // Codes fixed, the error is quadratic in the gain: its minimum is one division away.
        const float minimum = sum_lanes(product) / sum_lanes(energy);
        const float refined = half_to_float(float_to_half(between(minimum, kSmallestGain, kHalfMax)));
        float error = 0;
        KVC_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            if (is_taken(found, outliers, 32 * i + lane)) continue;
            const float left = x.latent[i] - refined * value[i];
            error += x.weight[i] * (left * left);
        }
        error = sum_lanes(error);
        if (error < best_error) {
            best_error = error, best = refined;
            KVC_UNROLL
            for (int i = 0; i < kMaxOutliers; ++i) exact[i] = found[i];
        }
    }
    return between(best, kSmallestGain, kHalfMax);
}

}  // namespace kvcompress::cuda
