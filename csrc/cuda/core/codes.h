// Codes and the numbers they stand for. What a width of codes is to the kernels stands here: how it is unpacked into
// halves, in each way that a kernel reads it, and what the halves are off by.
#pragma once

#include "kvcompress/common.h"

#include "cuda/core/numbers.h"

namespace kvcompress::cuda {

constexpr int kChunk = 64;  // tokens that go through the kernels together
constexpr int kGroup = 8;  // channels of a unit
constexpr int kPairs = 8;  // pairs of entries a lane has in a unit

// Two neighbouring units of one band; one where a band ends with an odd one.
struct Tile {
    int offset;  // of the first unit
    int channel;  // the first
    int units;
    int bits;
    float step;  // 1 for 16-bit channels
};

template <int VALUE>
struct Bits {
    static constexpr int value = VALUE;
};

// body(Bits<n>): n is known when the kernel is compiled, or, for BITS = 0, a tile's own.
template <int BITS, typename Body>
KVC_DEVICE void with_bits(int bits, const Body& body) {
    if constexpr (BITS != 0) {
        body(Bits<BITS>{});
    } else {
#define KVC_TRY(WIDTH) \
    if (bits == WIDTH) return body(Bits<WIDTH>{});
        KVC_CUDA_CODE_BITS(KVC_TRY)
#undef KVC_TRY
        body(Bits<16>{});
    }
}

// Whether there is one.
constexpr bool is_width(int bits) {
#define KVC_IS(WIDTH) || bits == WIDTH
    return bits == 16 KVC_CUDA_CODE_BITS(KVC_IS);
#undef KVC_IS
}

// A pair's halves are made by putting codes into the low bits of a half whose other bits are a power of two: code c at
// bit s of such a half is worth OFFSET + c, where OFFSET's last place is bit s. What a unit's pairs are offset by:
template <int BITS>
KVC_BOTH float pair_offset(int pair) {
    if (BITS == 8) return 1024;
    if (BITS == 4) return pair % 2 ? 16 : 256;
    if (BITS == 2) return pair % 3 == 0 ? 64 : pair % 3 == 1 ? 16 : 4;
    return 0;
}

// The code that stands for zero.
KVC_BOTH float middle(int bits) { return bits == 16 ? 0.f : static_cast<float>((1 << bits) - 1) / 2; }

// Eight pairs of codes in a lane's words, as halves.
template <int BITS>
KVC_DEVICE void unpack_words(const uint32_t (&words)[BITS / 2], uint32_t (&pair)[kPairs]) {
    if constexpr (BITS == 16) {
        KVC_UNROLL
        for (int i = 0; i < kPairs; ++i) pair[i] = words[i];
    } else if constexpr (BITS == 8) {
        KVC_UNROLL
        for (int i = 0; i < 4; ++i) {
            pair[2 * i] = bytes_of<0x4240>(words[i], 0x64u);
            pair[2 * i + 1] = bytes_of<0x4341>(words[i], 0x64u);
        }
    } else if constexpr (BITS == 4) {
        KVC_UNROLL
        for (int i = 0; i < 2; ++i) {
            // Codes at bits 2 and 6 of each half.
            const uint32_t low = words[i] << 2, high = words[i] >> 6;
            pair[4 * i] = mask_or<0x003c003c, 0x5c005c00>(low);
            pair[4 * i + 1] = mask_or<0x03c003c0, 0x4c004c00>(low);
            pair[4 * i + 2] = mask_or<0x003c003c, 0x5c005c00>(high);
            pair[4 * i + 3] = mask_or<0x03c003c0, 0x4c004c00>(high);
        }
    } else {
        static_assert(BITS == 2);
        const uint32_t word = words[0];
        // Codes at bits 4, 6 and 8 of each half: lower ones would have larger offsets, and sums less exact.
        const uint32_t low = word << 4, middle = word >> 2, high = word >> 8;
        pair[0] = mask_or<0x00300030, 0x54005400>(low);
        pair[1] = mask_or<0x00c000c0, 0x4c004c00>(low);
        pair[2] = mask_or<0x03000300, 0x44004400>(low);
        pair[3] = mask_or<0x00300030, 0x54005400>(middle);
        pair[4] = mask_or<0x00c000c0, 0x4c004c00>(middle);
        pair[5] = mask_or<0x03000300, 0x44004400>(middle);
        pair[6] = mask_or<0x00300030, 0x54005400>(high);
        pair[7] = mask_or<0x00c000c0, 0x4c004c00>(high);
    }
}

// The words at a place of one load: 4, 8 or 16 bytes.
template <int BITS>
KVC_DEVICE void load_words(const uint8_t* at, uint32_t (&words)[BITS / 2]) {
    if constexpr (BITS == 8) {
        const uint4 w = *reinterpret_cast<const uint4*>(at);
        words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
    } else if constexpr (BITS == 4) {
        const uint2 w = *reinterpret_cast<const uint2*>(at);
        words[0] = w.x, words[1] = w.y;
    } else {
        static_assert(BITS == 2);
        words[0] = *reinterpret_cast<const uint32_t*>(at);
    }
}

// Sum over tokens of (offset + middle) times the weights: a product with a constant tile, all rows of which are equal.
template <int BITS>
KVC_DEVICE void subtract_offsets(const uint32_t (&weights)[4][2], float (&sum)[4]) {
    KVC_UNROLL
    for (int f = 0; f < 4; ++f) {
        const float first = pair_offset<BITS>(2 * f), second = pair_offset<BITS>(2 * f + 1);
        if constexpr (BITS == 8) {  // 1024 + 127.5 is no half
            const uint32_t offset = halves_of(-first, -first), rest = halves_of(-middle(8), -middle(8));
            mma(sum, offset, offset, offset, offset, weights[f]);
            mma(sum, rest, rest, rest, rest, weights[f]);
        } else {
            const uint32_t a = halves_of(-first - middle(BITS), -first - middle(BITS));
            const uint32_t b = halves_of(-second - middle(BITS), -second - middle(BITS));
            mma(sum, a, a, b, b, weights[f]);
        }
    }
}

// A lane's four channels of a tile in two pairs: codes less 2^(BITS - 1), exactly; of 16 bits the channels themselves,
// zero where the tile has none. Codes where it has none are of another band, or anything.
template <int BITS>
KVC_DEVICE void unpack_four(const uint8_t* token, const Tile& tile, int t, uint32_t (&pair)[2]) {
    const uint8_t* codes = token + tile.offset;
    if constexpr (BITS == 16) {
        pair[0] = pair[1] = 0;
        if (t >= 2 * tile.units) return;
        const uint2 w = reinterpret_cast<const uint2*>(codes)[t];
        pair[0] = w.x, pair[1] = w.y;
    } else if constexpr (BITS == 8) {
        const auto* words = reinterpret_cast<const uint16_t*>(codes) + 2 * t;
        KVC_UNROLL
        for (int i = 0; i < 2; ++i)
            pair[i] = fma_halves(bytes_of<0x4140>(words[i], 0x64u), halves_of(1, 1), halves_of(-1152, -1152));
    } else if constexpr (BITS == 4) {
        const uint32_t word = reinterpret_cast<const uint16_t*>(codes)[t] * 0x10001u;
        const uint32_t scale = halves_of(1, 0.0625f), offset = halves_of(-1032, -72);
        pair[0] = fma_halves(mask_or<0x00f0000f, 0x64006400>(word), scale, offset);
        pair[1] = fma_halves(mask_or<0x00f0000f, 0x64006400>(word >> 8), scale, offset);
    } else {
        static_assert(BITS == 2);
        const uint32_t word = codes[t] * 0x10001u;
        const uint32_t scale = halves_of(1, 0.25f), offset = halves_of(-1026, -258);
        pair[0] = fma_halves(mask_or<0x000c0003, 0x64006400>(word), scale, offset);
        pair[1] = fma_halves(mask_or<0x000c0003, 0x64006400>(word >> 4), scale, offset);
    }
}

KVC_DEVICE float nearest_code(float latent, float gain, float step, int bits) {
    const float top = static_cast<float>((1 << bits) - 1);
    return between(rintf(latent / gain / step + top / 2), 0.f, top);
}

KVC_DEVICE float value_of(float code, float step, int bits) { return (code - middle(bits)) * step; }

}  // namespace kvcompress::cuda
