// Records whose tokens are whole (gain, then codes), and tiles of the latent that several of them make up.
#pragma once

#include "cpu/core/encode.h"
#include "cpu/core/float_side.h"
#include "cpu/core/half_side.h"
#include "cpu/core/integer_side.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// One record's token and the fifteen after it, token_bytes apart; `token` is a multiple of 16.
KVC_INLINE const uint8_t* stored_tokens(const kvc_shared_records& records, int request, int record, int token) {
    const int32_t block = records.block_table[request * records.block_table_stride + token / records.block_size];
    return records.data + block * records.block_stride +
           (static_cast<int64_t>(record) * records.block_size + token % records.block_size) * records.token_bytes;
}

KVC_INLINE float gain_of(const kvc_shared_records& records, const uint8_t* token) {
    if (records.side.gain_offset < 0) return 1.f;
    uint16_t half;
    std::memcpy(&half, token + records.side.gain_offset, 2);
    return half_to_float(half);
}

// The gains of up to sixteen tokens; 0 for those past `count`, whatever their bytes are.
KVC_INLINE void stored_gains(const kvc_shared_records& records, const uint8_t* tokens, int count, float* gains) {
    for (int i = 0; i < kGroup; ++i) gains[i] = i < count ? gain_of(records, tokens + i * records.token_bytes) : 0.f;
}

// Codes of a tile to out[position][tile], as `unpack_keys` has them, and gains[tile].
inline void read_tile_transposed(const kvc_shared_records& records, int request, int record, int start, int tokens,
                                 float* out, float* gains) {
    kvc_side side = records.side;
    side.code_bytes = records.token_bytes;  // from token to token
    for (int group = 0; group < tokens; group += kGroup) {
        const uint8_t* stored = stored_tokens(records, request, record, start + group);
        stored_gains(records, stored, min_of(tokens - group, kGroup), gains + group);
        unpack_keys(side, stored + side.code_offset, out + group);
    }
}

// Channels in order to out, and zeros or other finite numbers up to a whole vector.
template <int BITS>
inline void read_band(const uint8_t* codes, int width, float scale, float* out) {
    const float offset = -middle_of(BITS) * scale;
    int channel = 0;
    for (; channel + kLanes <= width; channel += kLanes)
        store(out + channel, numbers_of<BITS>(codes + channel * BITS / 8) * scale + offset);
    if (channel < width) {
        uint8_t last[4 * kLanes] = {};
        std::memcpy(last, codes + channel * BITS / 8, static_cast<size_t>((width - channel) * BITS / 8));
        store(out + channel, numbers_of<BITS>(last) * scale + offset);
    }
}

// A token's latent to out[channel], gain and steps multiplied in; up to a vector behind it is written, too.
inline void read_value(const kvc_shared_records& records, const uint8_t* token, float* out) {
    const kvc_side& side = records.side;
    const float gain = gain_of(records, token);
    const uint8_t* codes = token + side.code_offset;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], width = side.widths[band];
        const float scale = gain * side.steps[band];
        with_bits(bits, [&](auto n) { read_band<n>(codes, width, n >= 16 ? 1.f : scale, out); });
        codes += bits * width / 8;
        out += width;
    }
}

// out[c][token] = mean[c] + sum_position decode[position][c] latent[position][token], for eight channels c and the
// tile's first `tokens` tokens, or a few more.
inline void expand_block(const float* latent, const float* decode, int positions, const float* mean, int tokens,
                         float* out) {
    constexpr int kColumns = KVC_LANES == 16 ? 8 : 4, kVectors = 2;
    for (int token = 0; token < tokens; token += kVectors * kLanes)
        for (int column = 0; column < 8; column += kColumns) {
            VecF sums[kColumns][kVectors];
            repeat<kColumns>([&](auto c) KVC_LAMBDA {
                repeat<kVectors>([&](auto n) KVC_LAMBDA { sums[c][n] = splat(mean[column + c]); });
            });
            for (int position = 0; position < positions; ++position) {
                VecF vectors[kVectors];
                repeat<kVectors>([&](auto n)
                                     KVC_LAMBDA { vectors[n] = load(latent + position * kTile + token + n * kLanes); });
                repeat<kColumns>([&](auto c) KVC_LAMBDA {
                    const float factor = decode[position * 8 + column + c];
                    repeat<kVectors>([&](auto n) KVC_LAMBDA { sums[c][n] += vectors[n] * factor; });
                });
            }
            repeat<kColumns>([&](auto c) KVC_LAMBDA {
                repeat<kVectors>(
                    [&](auto n) KVC_LAMBDA { store(out + (column + c) * kTile + token + n * kLanes, sums[c][n]); });
            });
        }
}

#if KVC_LEVEL_NUMBER >= 3

template <int BITS>
inline uint8_t* read_band_pairs(const uint8_t* codes, int64_t stride, int bytes, uint8_t* out) {
    for (int byte = 0; byte < bytes; byte += 16) {
        const int left = min_of(bytes - byte, 16);
        const auto mask = static_cast<__mmask16>((1u << left) - 1u);
        __m512i tokens[4], words[4];
        load_tokens(codes + byte, stride, [mask](const uint8_t* p) { return _mm_maskz_loadu_epi8(mask, p); }, tokens);
        transpose_words(tokens, words);
        for (int w = 0; 4 * w < left; ++w) out = store_pairs<BITS>(words[w], out);
    }
    return out;
}

inline void read_tile_pairs(const kvc_shared_records& records, int request, int start, int tokens, uint8_t* out,
                            float* gains) {
    const kvc_side& side = records.side;
    for (int group = 0; group < tokens; group += kGroup) {
        const uint8_t* stored = stored_tokens(records, request, 0, start + group);
        stored_gains(records, stored, min_of(tokens - group, kGroup), gains + group);
        const uint8_t* codes = stored + side.code_offset;
        uint8_t* target = out + 4 * group;
        for (int band = 0; band < side.num_bands; ++band) {
            const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
            target = with_code_bits(
                bits, [&](auto n) { return read_band_pairs<n>(codes, records.token_bytes, bytes, target); });
            codes += bytes;
        }
    }
}

// `expand_block` from pairs of codes [stripe][position / 2][tile] and of decode [stripe][position / 2][8 channels]:
// out[c][token] = mean[c] + scale[c] sum_stripe gain[stripe][token] (sum of products).
inline void expand_block_pairs(const uint8_t* codes, const int16_t* decode, int stripes, int pairs, const float* gains,
                               const float* scale, const float* mean, int tokens, float* out) {
    constexpr int kColumns = 8, kVectors = 2;
    for (int token = 0; token < tokens; token += kVectors * kGroup) {
        __m512 totals[kColumns][kVectors];
        for (int stripe = 0; stripe < stripes; ++stripe) {
            __m512i sums[kColumns][kVectors];
            repeat<kColumns>([&](auto c) KVC_LAMBDA {
                repeat<kVectors>([&](auto n) KVC_LAMBDA { sums[c][n] = _mm512_setzero_si512(); });
            });
            const uint8_t* code = codes + 4 * (static_cast<int64_t>(stripe) * pairs * kTile + token);
            const int16_t* factors = decode + 16 * static_cast<int64_t>(stripe) * pairs;
            for (int pair = 0; pair < pairs; ++pair, code += 4 * kTile, factors += 16) {
                __m512i vectors[kVectors];
                repeat<kVectors>([&](auto n) KVC_LAMBDA { vectors[n] = _mm512_load_si512(code + 64 * n); });
                repeat<kColumns>([&](auto c) KVC_LAMBDA {
                    int32_t two;
                    std::memcpy(&two, factors + 2 * c, 4);
                    const __m512i factor = _mm512_set1_epi32(two);
                    repeat<kVectors>([&](auto n) KVC_LAMBDA {
                        // As an instruction, for the reason `dot_bytes` has.
                        __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[c][n]) : "v"(vectors[n]), "v"(factor));
                    });
                });
            }
            const float* gain = gains + stripe * kTile + token;
            repeat<kColumns>([&](auto c) KVC_LAMBDA {
                repeat<kVectors>([&](auto n) KVC_LAMBDA {
                    const __m512 part =
                        _mm512_mul_ps(_mm512_cvtepi32_ps(sums[c][n]), _mm512_load_ps(gain + n * kGroup));
                    totals[c][n] = stripe ? _mm512_add_ps(totals[c][n], part) : part;
                });
            });
        }
        repeat<kColumns>([&](auto c) KVC_LAMBDA {
            repeat<kVectors>([&](auto n) KVC_LAMBDA {
                const __m512 value = _mm512_fmadd_ps(totals[c][n], _mm512_set1_ps(scale[c]), _mm512_set1_ps(mean[c]));
                _mm512_store_ps(out + c * kTile + token + n * kGroup, value);
            });
        });
    }
}

#endif

size_t store_scratch_bytes() { return sizeof(float) * 9 * kMaxHeadDim; }

void store_token(const kvc_shared_store_args& args, int64_t token, void* scratch) {
    const kvc_shared_records& records = args.records;
    const int64_t slot = args.slots[token];
    if (slot < 0) return;
    auto* latent = static_cast<float*>(scratch);
    for (int record = 0; record < records.records; ++record) {
        load_row(args.latents, token, record, records.side.rank, latent);
        uint8_t* target =
            records.data + slot / records.block_size * records.block_stride +
            (static_cast<int64_t>(record) * records.block_size + slot % records.block_size) * records.token_bytes;
        encode_latent(records.side, latent, args.weight_HR + static_cast<int64_t>(record) * records.side.rank, target,
                      0, latent + kMaxHeadDim);
    }
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
