// The search for a token's gain, as kvcompress/codec/scalar.py specifies it.
#pragma once

#include "cpu/core/codes.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

constexpr float kSmallestGain = 0x1p-14f, kLargestGain = 65504.f, kHalfMax = 65504.f;
// 2^(i/3), i = -3..6: multiples of the root mean square tried as gain.
constexpr float kGainCandidates[] = {0.5f,        0.62996052f, 0.79370053f, 1.f,         1.25992105f,
                                     1.58740105f, 2.f,         2.51984210f, 3.17480210f, 4.f};

KVC_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// latent and weight are padded with zeros from each band's end to whole vectors: [band][padded width].
struct Padded {
    int width[KVC_MAX_BANDS];
    int total;
};

inline Padded padded(const kvc_side& side) {
    Padded p{};
    for (int band = 0; band < side.num_bands; ++band) p.total += p.width[band] = round_up(side.widths[band], kLanes);
    return p;
}

// Positions of the largest entries, of equal ones the first; they are overwritten by `instead`.
inline void take_largest(float* x, int total, int count, float instead, int* positions) {
    for (int n = 0; n < count; ++n) {
        VecF largest = load(x);
        for (int i = kLanes; i < total; i += kLanes) largest = max_of(load(x + i), largest);
        const float value = max_lane(largest);
        int position = 0;
        while (position + 1 < total && x[position] != value) ++position;
        positions[n] = position;
        x[position] = instead;
    }
}

// The gain, and the padded positions of the channels that are stored exactly. `scratch` has two padded arrays.
inline float best_gain(const kvc_side& side, const Padded& pad, const float* latent, const float* weight,
                       float* scratch, int* outliers) {
    float *errors = scratch, *kept = scratch + 2 * kMaxHeadDim;
    VecF squares = {};
    if (side.outliers) {
        for (int i = 0; i < pad.total; i += kLanes) store(errors + i, load(latent + i) * load(latent + i));
        take_largest(errors, pad.total, side.outliers, 0.f, outliers);
        for (int i = 0; i < pad.total; i += kLanes) squares += load(errors + i);
    } else {
        for (int i = 0; i < pad.total; i += kLanes) squares += load(latent + i) * load(latent + i);
    }
    const float rms = [&] {
        const float value = __builtin_sqrtf(sum(squares) / static_cast<float>(side.rank - side.outliers));
        return value < kSmallestGain ? kSmallestGain : value;
    }();
    float best_error = __builtin_inff(), best = rms;
    for (const float factor : kGainCandidates) {
        const float candidate = rms * factor;
        int found[KVC_MAX_OUTLIERS] = {};
        const float* weights = weight;
        if (side.outliers) {
            const float *x = latent, *w = weight;
            float* e = errors;
            for (int band = 0; band < side.num_bands; ++band) {
                const float step = side.steps[band], top = top_of(side.bits[band]);
                for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes, e += kLanes) {
                    const VecF miss =
                        load(x) - value_of(nearest_code(load(x), candidate, step, top), step, top) * candidate;
                    store(e, load(w) * (miss * miss));
                }
            }
            take_largest(errors, pad.total, side.outliers, -1.f, found);
            std::memcpy(kept, weight, sizeof(float) * static_cast<size_t>(pad.total));
            for (int n = 0; n < side.outliers; ++n) kept[found[n]] = 0;
            weights = kept;
        }
        VecF energies = {}, products = {};
        const float *x = latent, *w = weights;
        for (int band = 0; band < side.num_bands; ++band) {
            const float step = side.steps[band], top = top_of(side.bits[band]);
            for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes) {
                const VecF value = value_of(nearest_code(load(x), candidate, step, top), step, top);
                energies += load(w) * (value * value);
                products += load(w) * value * load(x);
            }
        }
        // Codes fixed, the error is quadratic in the gain: its minimum is one division away.
        const float refined =
            half_to_float(float_to_half(clamp(sum(products) / sum(energies), kSmallestGain, kLargestGain)));
        VecF misses = {};
        x = latent, w = weights;
        for (int band = 0; band < side.num_bands; ++band) {
            const float step = side.steps[band], top = top_of(side.bits[band]);
            for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes) {
                const VecF miss = load(x) - value_of(nearest_code(load(x), candidate, step, top), step, top) * refined;
                misses += load(w) * (miss * miss);
            }
        }
        const float error = sum(misses);
        if (error < best_error) {
            best_error = error, best = refined;
            for (int n = 0; n < side.outliers; ++n) outliers[n] = found[n];
        }
    }
    return clamp(best, kSmallestGain, kLargestGain);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
