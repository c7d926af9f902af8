// One token's latents to its record's parts, as kvcompress/codec/scalar.py specifies it.
#pragma once

#include "cpu/core/gain.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// One token's latents (overwritten) to its gain and codes.
inline void encode_latent(const kvc_side& side, float* latent, const float* weight, uint8_t* record, int offset,
                          float* scratch) {
    float *padded_latent = scratch, *padded_weight = scratch + 2 * kMaxHeadDim;
    for (int c = 0; c < side.rank; ++c) {
        if (latent[c] != latent[c]) latent[c] = 0;
        if (__builtin_isinf(latent[c])) latent[c] = latent[c] > 0 ? kHalfMax : -kHalfMax;
    }
    uint8_t* codes = record + side.code_offset + offset * side.code_bytes;
    if (side.bits[0] == 32) {
        std::memcpy(codes, latent, sizeof(float) * static_cast<size_t>(side.rank));
        return;
    }
    if (side.bits[0] == 16) {
        for (int c = 0; c < side.rank; ++c) {
            const uint16_t half = float_to_half(clamp(latent[c], -kHalfMax, kHalfMax));
            std::memcpy(codes + 2 * c, &half, 2);
        }
        return;
    }
    const Padded pad = padded(side);
    std::memset(padded_latent, 0, sizeof(float) * static_cast<size_t>(pad.total));
    std::memset(padded_weight, 0, sizeof(float) * static_cast<size_t>(pad.total));
    for (int band = 0, from = 0, to = 0; band < side.num_bands;
         from += side.widths[band], to += pad.width[band], ++band) {
        std::memcpy(padded_latent + to, latent + from, sizeof(float) * static_cast<size_t>(side.widths[band]));
        std::memcpy(padded_weight + to, weight + from, sizeof(float) * static_cast<size_t>(side.widths[band]));
    }
    int outliers[KVC_MAX_OUTLIERS] = {};
    const uint16_t gain =
        float_to_half(best_gain(side, pad, padded_latent, padded_weight, scratch + 4 * kMaxHeadDim, outliers));
    std::memcpy(record + side.gain_offset + 2 * offset, &gain, 2);
    const float rounded = half_to_float(gain);
    const float* band_latent = padded_latent;
    for (int band = 0, first = 0; band < side.num_bands; first += side.widths[band], ++band) {
        const float step = side.steps[band], top = top_of(side.bits[band]);
        for (int i = 0; i < pad.width[band]; i += kLanes)
            store(latent + i, nearest_code(load(band_latent + i), rounded, step, top));
        pack_band(latent, side.bits[band], side.widths[band], codes);
        for (int n = 0; n < side.outliers; ++n) {
            const int64_t place = outliers[n] - (band_latent - padded_latent);
            if (place < 0 || place >= pad.width[band]) continue;
            const float left = band_latent[place] - value_of(latent[place], step, top) * rounded;
            const uint16_t half = float_to_half(clamp(left, -kHalfMax, kHalfMax));
            std::memcpy(record + side.outlier_offset + 2 * (side.outliers * offset + n), &half, 2);
            record[side.channel_offset + side.outliers * offset + n] = static_cast<uint8_t>(first + place);
        }
        codes += side.bits[band] * side.widths[band] / 8;
        band_latent += pad.width[band];
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
