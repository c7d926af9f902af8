// One side of the cache in integers (AVX-512 VNNI): codes stay unsigned bytes, the other factor (a query, or
// probabilities times gains) is split into three base-256 digits, so that 24 bits of it take part: as exact as float32,
// at six multiply-adds of 64 products where float32 needs eight of 16 and the conversions.
//
// `vpdpbusd` adds four products of neighbouring bytes to a 32-bit lane. Keys put four channels of a token in a lane,
// values four tokens of a channel. No sum overflows: 512 channels * 255 * 128 < 2^31.
#pragma once

#include "cpu/core/codes.h"

#if KVC_LEVEL_NUMBER >= 3

#include <immintrin.h>

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

constexpr int kDigits = 3;
constexpr int kFactorBytes = 16;  // one row's factors of one quad: four bytes of each digit, and four unused

// Bytes that the next tile needs, asked for line by line while this one is computed.
struct Ahead {
    const uint8_t* next;
    const uint8_t* stop;

    KVC_INLINE void step() {
        // No branch: past the end, the last line is asked for again.
        __builtin_prefetch(next);
        const uint8_t* line = next + 64;
        next = line < stop ? line : next;
    }
};

// sum += products of four neighbouring bytes. As an instruction, because GCC 12 copies and spills the sums around the
// intrinsic.
KVC_INLINE void dot_bytes(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// sums[row][digit][n] += codes[quad][n] . factors[quad][row][digit], over all quads; SIGNED_CODES says which side of the
// product has signed bytes.
template <int ROWS, int VECTORS, bool SIGNED_CODES>
KVC_INLINE void accumulate(__m512i (&sums)[ROWS][kDigits][VECTORS], const uint8_t* codes, int64_t code_step,
                           int64_t quad_step, const uint8_t* factors, int64_t factor_step, int quads, Ahead& ahead) {
    for (int quad = 0; quad < quads; ++quad, codes += quad_step, factors += factor_step) {
        ahead.step();
        ahead.step();
        __m512i code[VECTORS];
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { code[n] = _mm512_load_si512(codes + n * code_step); });
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kDigits>([&](auto d) KVC_LAMBDA {
                int32_t four;
                std::memcpy(&four, factors + row * kFactorBytes + 4 * d, 4);
                const __m512i factor = _mm512_set1_epi32(four);
                repeat<VECTORS>([&](auto n) KVC_LAMBDA {
                    dot_bytes(sums[row][d][n], SIGNED_CODES ? factor : code[n], SIGNED_CODES ? code[n] : factor);
                });
            });
        });
    }
}
KVC_INLINE float digits_to_float(int d0, int d1, int d2) {
    return static_cast<float>(d2) * 65536.f + (static_cast<float>(d1) * 256.f + static_cast<float>(d0));
}
KVC_INLINE __m512 digits_to_float(__m512i d0, __m512i d1, __m512i d2) {
    const __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d1), _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(d0));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(d2), _mm512_set1_ps(65536.f), low);
}

// ---- keys ----------------------------------------------------------------------------------------------------------
// Scratch [group][quad][16 tokens][4 bytes]. The bytes of a band's row are read as words of four; field f (of 8/bits) of
// byte b of word w is channel (4w + b) * 8/bits + f and sits in quad w * 8/bits + f.

KVC_INLINE int key_quads(const kvc_side& side) {
    int quads = 0;
    for (int band = 0; band < side.num_bands; ++band)
        quads += round_up(side.bits[band] * side.widths[band] / 8, 4) / 4 * (8 / side.bits[band]);
    return quads;
}

// Sixteen tokens' words, four per vector: lane L of vector i holds token 4L + i, so that transposed tokens are in order.
template <typename Load>
KVC_INLINE void load_tokens(const uint8_t* codes, int64_t stride, Load load16, __m512i out[4]) {
    for (int i = 0; i < 4; ++i) {
        const uint8_t* p = codes + i * stride;
        __m512i tokens = _mm512_castsi128_si512(load16(p));
        tokens = _mm512_mask_broadcast_i32x4(tokens, 0x00f0, load16(p + 4 * stride));
        tokens = _mm512_mask_broadcast_i32x4(tokens, 0x0f00, load16(p + 8 * stride));
        out[i] = _mm512_mask_broadcast_i32x4(tokens, 0xf000, load16(p + 12 * stride));
    }
}

// Four tokens' words, one token per 16-byte lane, to one word per vector: 4x4 transposition inside each lane.
KVC_INLINE void transpose_words(const __m512i in[4], __m512i out[4]) {
    const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpackhi_epi32(in[0], in[1]);
    const __m512i c = _mm512_unpacklo_epi32(in[2], in[3]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

template <int BITS>
KVC_INLINE uint8_t* unpack_key_band_integer(const uint8_t* codes, int64_t stride, int bytes, uint8_t* out) {
    int byte = 0;
    __m512i tokens[4], words[4];
    for (; byte + 16 <= bytes; byte += 16) {
        load_tokens(
            codes + byte, stride, [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); },
            tokens);
        transpose_words(tokens, words);
        for (int w = 0; w < 4; ++w) out = store_fields<BITS>(words[w], out);
    }
    if (byte < bytes) {
        const auto mask = static_cast<__mmask16>((1u << (bytes - byte)) - 1u);
        load_tokens(codes + byte, stride, [mask](const uint8_t* p) { return _mm_maskz_loadu_epi8(mask, p); }, tokens);
        transpose_words(tokens, words);
        for (int w = 0; 4 * w < bytes - byte; ++w) out = store_fields<BITS>(words[w], out);
    }
    return out;
}

KVC_NOINLINE void unpack_keys_integer(const kvc_side& side, const uint8_t* codes, uint8_t* out) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        out = with_code_bits(
            bits, [&](auto n) KVC_LAMBDA { return unpack_key_band_integer<n>(codes, side.code_bytes, bytes, out); });
        codes += bytes;
    }
}

// What a score needs beside its query's digits.
struct IntegerQuery {
    float scale;  // score = gain * scale * (sum of digits times centred codes + half_sum)
    float half_sum;  // codes are centred at 2^(b-1), the code's middle is half a step below
    int32_t centre[kDigits];  // minus sum of digits times 2^(b-1)
    int32_t padding[3];
};

// One row's factors of every quad, `step` bytes apart.
inline void integer_query(const kvc_side& side, const float* absorbed, int quads, IntegerQuery& query, uint8_t* factors,
                          int step) {
    constexpr float kLargest = 8355000.f;  // 127 * 65536 + 127 * 256 + 127, less the rounding of the scale
    float largest = 0;
    const float* x = absorbed;
    for (int band = 0; band < side.num_bands; ++band)
        for (int channel = 0; channel < side.widths[band]; ++channel) {
            const float magnitude = __builtin_fabsf(*x++ * side.steps[band]);
            if (magnitude > largest) largest = magnitude;
        }
    const float inverse = largest > 1e-30f ? kLargest / largest : 0.f;
    query.scale = largest / kLargest;
    for (int quad = 0; quad < quads; ++quad) std::memset(factors + quad * step, 0, kFactorBytes);
    int64_t doubled = 0;
    int64_t centre[kDigits] = {};
    int base = 0;
    x = absorbed;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], fields = 8 / bits;
        for (int channel = 0; channel < side.widths[band]; ++channel) {
            const auto value = static_cast<uint32_t>(_mm_cvtss_si32(_mm_set_ss(*x++ * side.steps[band] * inverse)));
            const uint32_t biased = (value + 0x8080u) ^ 0x8080u;
            const int byte = channel / fields, field = channel % fields;
            uint8_t* target = factors + (base + byte / 4 * fields + field) * step + byte % 4;
            doubled += static_cast<int32_t>(value);
            for (int d = 0; d < kDigits; ++d) {
                const auto digit = static_cast<int8_t>(biased >> (8 * d));
                target[4 * d] = static_cast<uint8_t>(digit);
                centre[d] -= static_cast<int64_t>(digit) * (1 << (bits - 1));
            }
        }
        base += round_up(bits * side.widths[band] / 8, 4) / 4 * fields;
    }
    for (int d = 0; d < kDigits; ++d) query.centre[d] = static_cast<int32_t>(centre[d]);
    query.half_sum = 0.5f * static_cast<float>(doubled);
}

template <int ROWS, int GROUPS>
KVC_INLINE void score_rows_integer(const IntegerQuery* query, const uint8_t* factors, int step, const uint8_t* keys,
                                   int quads, float* score, Ahead& ahead) {
    for (int group = 0; group < kTileGroups; group += GROUPS) {
        __m512i sums[ROWS][kDigits][GROUPS];
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kDigits>([&](auto d) KVC_LAMBDA {
                repeat<GROUPS>([&](auto g) KVC_LAMBDA { sums[row][d][g] = _mm512_set1_epi32(query[row].centre[d]); });
            });
        });
        accumulate<ROWS, GROUPS, false>(sums, keys + group * quads * 64, quads * 64, 64, factors, step, quads, ahead);
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<GROUPS>([&](auto g) KVC_LAMBDA {
                const __m512 sum = digits_to_float(sums[row][0][g], sums[row][1][g], sums[row][2][g]);
                const __m512 scale = _mm512_set1_ps(query[row].scale);
                const __m512 scaled = _mm512_mul_ps(_mm512_add_ps(sum, _mm512_set1_ps(query[row].half_sum)), scale);
                _mm512_store_ps(score + row * kTile + (group + g) * kGroup, scaled);
            });
        });
    }
}

inline void score_tile_integer(const IntegerQuery* query, const uint8_t* factors, int rows, const uint8_t* keys,
                               int quads, float* score, Ahead ahead) {
    const int step = rows * kFactorBytes;
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows_integer<4, 2>(query + row, factors + row * kFactorBytes, step, keys, quads, score + row * kTile,
                                 ahead);
    for (; row + 2 <= rows; row += 2)
        score_rows_integer<2, 4>(query + row, factors + row * kFactorBytes, step, keys, quads, score + row * kTile,
                                 ahead);
    for (; row < rows; ++row)
        score_rows_integer<1, 4>(query + row, factors + row * kFactorBytes, step, keys, quads, score + row * kTile,
                                 ahead);
}

// ---- values --------------------------------------------------------------------------------------------------------
// Scratch [token quad][vector][16 channels][4 tokens], codes centred at 2^(b-1) as signed bytes. A band's bytes are taken
// 64, 32 or up to 16 at a time; the interleave works inside 16-byte lanes, which gives the order in `value_channel`.

constexpr int chunk_bytes(int left) { return left >= 64 ? 64 : left >= 32 ? 32 : 16; }
// Words each interleaved vector of a chunk holds.
constexpr int chunk_words(int left) { return chunk_bytes(left) / 4; }
constexpr int chunk_vectors(int left) { return left >= 16 ? 4 : (left + 3) / 4; }

KVC_INLINE int value_positions(const kvc_side& side) {
    int positions = 0;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band];
        for (int left = bits * side.widths[band] / 8; left > 0; left -= chunk_bytes(left))
            positions += chunk_words(left) * chunk_vectors(left) * (8 / bits);
    }
    return round_up(positions, 16);
}

KVC_INLINE void interleave(const __m512i in[4], __m512i out[4]) {
    const __m512i a = _mm512_unpacklo_epi8(in[0], in[1]), b = _mm512_unpackhi_epi8(in[0], in[1]);
    const __m512i c = _mm512_unpacklo_epi8(in[2], in[3]), d = _mm512_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
}

template <int BITS>
KVC_INLINE uint8_t* unpack_value_band_integer(const uint8_t* codes, int64_t stride, int bytes, uint8_t* out) {
    int byte = 0;
    for (; bytes - byte >= 64; byte += 64) {
        __m512i in[4], words[4];
        for (int t = 0; t < 4; ++t) in[t] = _mm512_loadu_si512(codes + t * stride + byte);
        interleave(in, words);
        for (int field = 0; field < 8 / BITS; ++field)
            for (int k = 0; k < 4; ++k, out += 64) _mm512_storeu_si512(out, centred_field<BITS>(words[k], field));
    }
    for (; bytes - byte >= 32; byte += 32) {
        __m512i in[4], words[4];
        for (int t = 0; t < 4; ++t)
            in[t] =
                _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + t * stride + byte)));
        interleave(in, words);
        const __m512i pairs[2] = {_mm512_inserti64x4(words[0], _mm512_castsi512_si256(words[1]), 1),
                                  _mm512_inserti64x4(words[2], _mm512_castsi512_si256(words[3]), 1)};
        for (int field = 0; field < 8 / BITS; ++field)
            for (int k = 0; k < 2; ++k, out += 64) _mm512_storeu_si512(out, centred_field<BITS>(pairs[k], field));
    }
    for (; byte < bytes; byte += 16) {
        const int left = min_of(bytes - byte, 16);
        const auto mask = static_cast<__mmask16>((1u << left) - 1u);
        __m512i in[4], words[4];
        for (int t = 0; t < 4; ++t)
            in[t] = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(mask, codes + t * stride + byte));
        interleave(in, words);
        for (int field = 0; field < 8 / BITS; ++field)
            for (int k = 0; 4 * k < left; ++k, out += 16)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                                 _mm512_castsi512_si128(centred_field<BITS>(words[k], field)));
    }
    return out;
}

// Four tokens' codes to one row of the scratch, `positions` words.
KVC_NOINLINE void unpack_values_integer(const kvc_side& side, const uint8_t* codes, uint8_t* out) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        out = with_code_bits(
            bits, [&](auto n) KVC_LAMBDA { return unpack_value_band_integer<n>(codes, side.code_bytes, bytes, out); });
        codes += bytes;
    }
}

// latent[channel] = at_position[...] * step.
inline void value_channels_integer(const kvc_side& side, const float* at_position, float* latent) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], fields = 8 / bits, bytes = bits * side.widths[band] / 8;
        for (int byte = 0; byte < bytes; byte += chunk_bytes(bytes - byte)) {
            const int size = chunk_bytes(bytes - byte), words = chunk_words(bytes - byte),
                      vectors = chunk_vectors(bytes - byte);
            for (int inner = 0; inner < size && byte + inner < bytes; ++inner) {
                // Byte 16 L + 4 k + i of a chunk lands in word 4 L + i of vector k.
                const int vector = inner % 16 / 4, word = inner / 16 * 4 + inner % 4;
                for (int field = 0; field < fields; ++field)
                    latent[(byte + inner) * fields + field] =
                        at_position[(field * vectors + vector) * words + word] * side.steps[band];
            }
            at_position += words * vectors * fields;
        }
        latent += side.widths[band];
    }
}

// Non-negative weights of a tile's tokens to one row's factors of every quad, `step` bytes apart; returns the scale.
inline float integer_weights(const float* weight, float largest, uint8_t* factors, int step) {
    constexpr float kLargest = 16776000.f;  // below 2^24 after rounding
    const float inverse = largest > 1e-30f ? kLargest / largest : 0.f;
    // Bytes of four 32-bit weights to four bytes of each digit.
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int token = 0; token < kTile; token += kGroup, factors += 4 * step) {
        const __m512i value =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weight + token), _mm512_set1_ps(inverse)));
        const __m512i digits = _mm512_shuffle_epi8(value, by_digit);
        _mm_store_si128(reinterpret_cast<__m128i*>(factors), _mm512_castsi512_si128(digits));
        _mm_store_si128(reinterpret_cast<__m128i*>(factors + step), _mm512_extracti32x4_epi32(digits, 1));
        _mm_store_si128(reinterpret_cast<__m128i*>(factors + 2 * step), _mm512_extracti32x4_epi32(digits, 2));
        _mm_store_si128(reinterpret_cast<__m128i*>(factors + 3 * step), _mm512_extracti32x4_epi32(digits, 3));
    }
    return inverse > 0 ? largest / kLargest : 0.f;
}

// What a tile's weights contribute: sums = sums * decay + scale * (digits times codes) + half of the weights' sum.
struct TileWeights {
    float decay;
    float scale;
    float half_sum;
};

template <int ROWS, int VECTORS>
KVC_INLINE void mix_rows_integer(const TileWeights* weights, const uint8_t* factors, int step, const uint8_t* values,
                                 int quads, int positions, float* sums, Ahead& ahead) {
    __m512i acc[ROWS][kDigits][VECTORS];
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<kDigits>([&](auto d) KVC_LAMBDA {
            repeat<VECTORS>([&](auto n) KVC_LAMBDA { acc[row][d][n] = _mm512_setzero_si512(); });
        });
    });
    accumulate<ROWS, VECTORS, true>(acc, values, 64, 4 * positions, factors, step, quads, ahead);
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        const __m512 decay = _mm512_set1_ps(weights[row].decay), scale = _mm512_set1_ps(weights[row].scale);
        const __m512 half = _mm512_set1_ps(weights[row].half_sum);
        repeat<VECTORS>([&](auto n) KVC_LAMBDA {
            const __m512 sum = digits_to_float(acc[row][0][n], acc[row][1][n], acc[row][2][n]);
            float* target = sums + row * positions + 16 * n;
            const __m512 old = _mm512_fmadd_ps(_mm512_load_ps(target), decay, half);
            _mm512_store_ps(target, _mm512_fmadd_ps(sum, scale, old));
        });
    });
}

template <int ROWS, int BLOCK>
KVC_INLINE void mix_all_integer(const TileWeights* weights, const uint8_t* factors, int step, const uint8_t* values,
                                int quads, int positions, int count, float* sums, Ahead& ahead) {
    int position = 0;
    for (; position + 16 * BLOCK <= count; position += 16 * BLOCK)
        mix_rows_integer<ROWS, BLOCK>(weights, factors, step, values + 4 * position, quads, positions, sums + position,
                                      ahead);
    for (; position < count; position += 16)
        mix_rows_integer<ROWS, 1>(weights, factors, step, values + 4 * position, quads, positions, sums + position,
                                  ahead);
}

// The first `count` of each quad's and each row's positions.
inline void mix_tile_integer(const TileWeights* weights, const uint8_t* factors, int rows, const uint8_t* values,
                             int quads, int positions, int count, float* sums, Ahead& ahead) {
    const int step = rows * kFactorBytes;
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        mix_all_integer<4, 2>(weights + row, factors + row * kFactorBytes, step, values, quads, positions, count,
                              sums + row * positions, ahead);
    for (; row + 2 <= rows; row += 2)
        mix_all_integer<2, 4>(weights + row, factors + row * kFactorBytes, step, values, quads, positions, count,
                              sums + row * positions, ahead);
    for (; row < rows; ++row)
        mix_all_integer<1, 4>(weights + row, factors + row * kFactorBytes, step, values, quads, positions, count,
                              sums + row * positions, ahead);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL

#endif
