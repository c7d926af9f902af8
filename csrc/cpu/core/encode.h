// Encoding tokens of one head, as kvcompress/codec/scalar.py specifies it.
#pragma once

#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

static_assert(kAppendTokens <= kMatrixRows);

constexpr float kSmallestGain = 0x1p-14f, kLargestGain = 65504.f, kHalfMax = 65504.f;
// 2^(i/3), i = -3..6: multiples of the root mean square tried as gain.
constexpr float kGainCandidates[] = {0.5f, 0.62996052f, 0.79370053f, 1.f, 1.25992105f,
                                     1.58740105f, 2.f, 2.51984210f, 3.17480210f, 4.f};

KVC_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Nearest code of unit-gain latents, ties to even; lanes past the band's width see zeros and are not used.
KVC_INLINE VecF nearest_code(VecF latent, float gain, float step, float top) {
    constexpr float kRound = 12582912.f;
    VecF level = latent / gain / step + top / 2;
    level = min_of(max_of(level, VecF{}), splat(top));  // clamped first: rounding by addition needs small numbers
    return (level + kRound) - kRound;
}

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
inline float best_gain(const kvc_side& side, const Padded& pad, const float* latent, const float* weight, float* scratch, int* outliers) {
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
                const float step = side.steps[band], top = static_cast<float>((1 << side.bits[band]) - 1);
                for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes, e += kLanes) {
                    const VecF miss = load(x) - (nearest_code(load(x), candidate, step, top) - top / 2) * step * candidate;
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
            const float step = side.steps[band], top = static_cast<float>((1 << side.bits[band]) - 1);
            for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes) {
                const VecF value = (nearest_code(load(x), candidate, step, top) - top / 2) * step;
                energies += load(w) * (value * value);
                products += load(w) * value * load(x);
            }
        }
        // Codes fixed, the error is quadratic in the gain: its minimum is one division away.
        const float refined = half_to_float(float_to_half(clamp(sum(products) / sum(energies), kSmallestGain, kLargestGain)));
        VecF misses = {};
        x = latent, w = weights;
        for (int band = 0; band < side.num_bands; ++band) {
            const float step = side.steps[band], top = static_cast<float>((1 << side.bits[band]) - 1);
            for (int i = 0; i < pad.width[band]; i += kLanes, x += kLanes, w += kLanes) {
                const VecF miss = load(x) - (nearest_code(load(x), candidate, step, top) - top / 2) * step * refined;
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

inline void pack_band(const float* codes, int bits, int width, uint8_t* out) {
    const int per_byte = 8 / bits;
    for (int byte = 0; byte < width / per_byte; ++byte) {
        unsigned packed = 0;
        for (int i = 0; i < per_byte; ++i) packed |= static_cast<unsigned>(codes[byte * per_byte + i]) << (bits * i);
        out[byte] = static_cast<uint8_t>(packed);
    }
}

// One token's latents (overwritten) to its gain and codes.
inline void encode_latent(const kvc_side& side, float* latent, const float* weight, uint8_t* record, int offset, float* scratch) {
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
    for (int band = 0, from = 0, to = 0; band < side.num_bands; from += side.widths[band], to += pad.width[band], ++band) {
        std::memcpy(padded_latent + to, latent + from, sizeof(float) * static_cast<size_t>(side.widths[band]));
        std::memcpy(padded_weight + to, weight + from, sizeof(float) * static_cast<size_t>(side.widths[band]));
    }
    int outliers[KVC_MAX_OUTLIERS] = {};
    const uint16_t gain = float_to_half(best_gain(side, pad, padded_latent, padded_weight, scratch + 4 * kMaxHeadDim, outliers));
    std::memcpy(record + side.gain_offset + 2 * offset, &gain, 2);
    const float rounded = half_to_float(gain);
    const float* band_latent = padded_latent;
    for (int band = 0, first = 0; band < side.num_bands; first += side.widths[band], ++band) {
        const float step = side.steps[band], top = static_cast<float>((1 << side.bits[band]) - 1);
        for (int i = 0; i < pad.width[band]; i += kLanes) store(latent + i, nearest_code(load(band_latent + i), rounded, step, top));
        pack_band(latent, side.bits[band], side.widths[band], codes);
        for (int n = 0; n < side.outliers; ++n) {
            const int64_t place = outliers[n] - (band_latent - padded_latent);
            if (place < 0 || place >= pad.width[band]) continue;
            const float left = band_latent[place] - (latent[place] - top / 2) * step * rounded;
            const uint16_t half = float_to_half(clamp(left, -kHalfMax, kHalfMax));
            std::memcpy(record + side.outlier_offset + 2 * (side.outliers * offset + n), &half, 2);
            record[side.channel_offset + side.outliers * offset + n] = static_cast<uint8_t>(first + place);
        }
        codes += side.bits[band] * side.widths[band] / 8;
        band_latent += pad.width[band];
    }
}

inline void encode_side(const kvc_append_args& args, const kvc_side& side, const kvc_rows& rows, int64_t first, int count, int head,
                        const float* mean_HD, const float* encode_HDR, const float* weight_HR, float* scratch) {
    const kvc_pages& pages = args.pages;
    const int head_dim = pages.head_dim;
    float *x = scratch, *latent = x + kAppendTokens * kMaxHeadDim, *rest = latent + kAppendTokens * kMaxHeadDim;
    for (int i = 0; i < count; ++i) {
        load_row(rows, first + i, head, head_dim, x + i * kMaxHeadDim);
        for (int d = 0; d < head_dim; ++d) x[i * kMaxHeadDim + d] -= mean_HD[head * head_dim + d];
    }
    const float* encode = encode_HDR + static_cast<int64_t>(head) * head_dim * side.rank;
    rows_times_matrix(x, count, kMaxHeadDim, encode, head_dim, side.rank, latent, kMaxHeadDim);
    for (int i = 0; i < count; ++i) {
        const int64_t slot = args.slots[first + i];
        if (slot < 0) continue;
        uint8_t* record = pages.data + slot / pages.block_size * pages.block_stride + head * pages.head_stride;
        encode_latent(side, latent + i * kMaxHeadDim, weight_HR + head * side.rank, record, static_cast<int>(slot % pages.block_size), rest);
    }
}

size_t append_scratch_bytes(const kvc_append_args&) { return sizeof(float) * (2 * kAppendTokens + 8) * kMaxHeadDim; }

void append(const kvc_append_args& args, int64_t first, int count, int head, void* scratch) {
    auto* floats = static_cast<float*>(scratch);
    const kvc_pages& pages = args.pages;
    encode_side(args, pages.k, args.keys, first, count, head, args.k_mean_HD, args.k_encode_HDR, args.k_weight_HR, floats);
    encode_side(args, pages.v, args.values, first, count, head, args.v_mean_HD, args.v_encode_HDR, args.v_weight_HR, floats);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
