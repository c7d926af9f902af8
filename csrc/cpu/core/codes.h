// Codes and the numbers they stand for. What a width of codes or floats is to the kernels stands here: how it is
// unpacked, in each way that a kernel reads it, and packed.
#pragma once

#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// body(n) with the width as a compile-time number.
template <typename Body>
KVC_INLINE auto with_code_bits(int bits, const Body& body) {
#define KVC_TRY(BITS) \
    if (bits == BITS) return body(std::integral_constant<int, BITS>{});
    KVC_CPU_CODE_BITS(KVC_TRY)
    __builtin_unreachable();  // `covered` has seen to it
}
template <typename Body>
KVC_INLINE auto with_bits(int bits, const Body& body) {
    KVC_CPU_FLOAT_BITS(KVC_TRY)
#undef KVC_TRY
    return with_code_bits(bits, body);
}

// The largest code, and the one that stands for zero.
KVC_INLINE float top_of(int bits) { return static_cast<float>((1 << bits) - 1); }
KVC_INLINE float middle_of(int bits) { return bits >= 16 ? 0.f : top_of(bits) / 2; }

// Nearest code of unit-gain latents, ties to even; lanes past the band's width see zeros and are not used.
KVC_INLINE VecF nearest_code(VecF latent, float gain, float step, float top) {
    constexpr float kRound = 12582912.f;
    VecF level = latent / gain / step + top / 2;
    level = min_of(max_of(level, VecF{}), splat(top));  // clamped first: rounding by addition needs small numbers
    return (level + kRound) - kRound;
}
KVC_INLINE VecF value_of(VecF code, float step, float top) { return (code - top / 2) * step; }
KVC_INLINE float value_of(float code, float step, float top) { return (code - top / 2) * step; }

inline void pack_band(const float* codes, int bits, int width, uint8_t* out) {
    const int per_byte = 8 / bits;
    for (int byte = 0; byte < width / per_byte; ++byte) {
        unsigned packed = 0;
        for (int i = 0; i < per_byte; ++i) packed |= static_cast<unsigned>(codes[byte * per_byte + i]) << (bits * i);
        out[byte] = static_cast<uint8_t>(packed);
    }
}

// A band's 32-bit words, and the channels in one: field f of word w is channel w * fields + f.
constexpr int words_of(int bits, int width) { return round_up(bits * width / 8, 4) / 4; }
constexpr int fields_of(int bits) { return 32 / bits; }

template <int BITS>
KVC_INLINE VecF field_to_float(VecU word, int field) {
    if constexpr (BITS == 32) {
        (void)field;
        return bits_to_float(word);
    } else {
        const VecU code = word >> static_cast<uint32_t>(BITS * field) & ((1u << BITS) - 1u);
        if (BITS == 16) return half_to_float(code);
        return __builtin_convertvector(reinterpret_cast<const VecI&>(code), VecF) - middle_of(BITS);
    }
}

// One vector of channels, in order, to numbers: integers below 2^BITS, or floats.
template <int BITS>
KVC_INLINE VecF numbers_of(const uint8_t* codes) {
    if constexpr (BITS == 32) {
        VecF v;
        std::memcpy(&v, codes, sizeof v);
        return v;
    } else if constexpr (BITS == 16) {
#if KVC_LEVEL_NUMBER >= 1
        return load_halves(codes);
#else
        typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
        Halves halves;
        std::memcpy(&halves, codes, sizeof halves);
        return half_to_float(__builtin_convertvector(halves, VecU));
#endif
    } else if constexpr (BITS == 8) {
        typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
        Bytes bytes;
        std::memcpy(&bytes, codes, sizeof bytes);
        return __builtin_convertvector(__builtin_convertvector(bytes, VecI), VecF);
    } else {
        // Every lane shifts its channel down from the word that holds it.
        constexpr int kPerWord = 32 / BITS, kBytes = kLanes * BITS / 8;
        uint32_t words[2] = {};
        std::memcpy(words, codes, kBytes);
        VecU word = words[0] - VecU{}, shift;
        for (int lane = 0; lane < kLanes; ++lane) shift[lane] = static_cast<uint32_t>(lane % kPerWord * BITS);
        if constexpr (kBytes > 4) {
            VecI lanes;
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
            word = lanes < kPerWord ? word : words[1] - VecU{};
        }
        const VecU code = word >> shift & ((1u << BITS) - 1u);
        return __builtin_convertvector(reinterpret_cast<const VecI&>(code), VecF);
    }
}

#if KVC_LEVEL_NUMBER >= 3

// Fields of words of four bytes, unsigned, one after the other.
template <int BITS>
KVC_INLINE uint8_t* store_fields(__m512i word, uint8_t* out) {
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
    for (int field = 0; field < 8 / BITS; ++field, out += 64) {
        const __m512i shifted = field ? _mm512_srli_epi32(word, static_cast<unsigned>(BITS * field)) : word;
        _mm512_store_si512(out, BITS == 8 ? shifted : _mm512_and_si512(shifted, mask));
    }
    return out;
}

// One of them as signed bytes around zero, half a step off.
template <int BITS>
KVC_INLINE __m512i centred_field(__m512i codes, int field) {
    if (BITS == 8) return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    const __m512i shifted = field ? _mm512_srli_epi32(codes, static_cast<unsigned>(BITS * field)) : codes;
    const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
    return _mm512_sub_epi8(code, _mm512_set1_epi8(1 << (BITS - 1)));
}

// Codes of a tile as signed 16-bit numbers 2 code - (2^bits - 1), two neighbouring positions in one 32-bit word:
// out[position / 2][tile]. `vpdpwssd` adds two products of them to a word, twice as many as float32 has.
template <int BITS>
KVC_INLINE uint8_t* store_pairs(__m512i word, uint8_t* out) {
    const __m512i low = _mm512_set1_epi32((1 << BITS) - 1), high = _mm512_set1_epi32(((1 << BITS) - 1) << 16);
    const __m512i middle = _mm512_set1_epi16((1 << BITS) - 1);
    for (int field = 0; field < 32 / BITS; field += 2, out += 4 * kTile) {
        const __m512i x = field ? _mm512_srli_epi32(word, static_cast<unsigned>(BITS * field)) : word;
        const __m512i pair =
            _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_slli_epi32(x, 16 - BITS), high));
        _mm512_store_si512(out, _mm512_sub_epi16(_mm512_add_epi16(pair, pair), middle));
    }
    return out;
}

#endif

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
