// Pages in fragment order, as kvcompress/codec/heads/fragment.py specifies it: where codes lie, and how a lane's become halves.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

constexpr int kChunk = 64;   // tokens whose records lie together
constexpr int kGroup = 8;    // channels of a unit
constexpr int kPairs = 8;    // pairs of entries a lane has in a unit
constexpr int kRows = 8;     // query rows of a tile: columns of the tensor core's second operand

KVC_BOTH int unit_bytes(int bits) { return kChunk * bits; }

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

// A lane's share of a unit, eight pairs of halves.
template <int BITS>
KVC_DEVICE void unpack(const uint8_t* unit, int lane, uint32_t (&pair)[kPairs]) {
    uint32_t words[BITS / 2];
    if constexpr (BITS == 16) {
        KVC_UNROLL
        for (int piece = 0; piece < 2; ++piece) {
            const auto* quads = reinterpret_cast<const uint4*>(unit) + 32 * piece;
            const uint4 w = quads[lane];
            words[4 * piece] = w.x, words[4 * piece + 1] = w.y, words[4 * piece + 2] = w.z, words[4 * piece + 3] = w.w;
        }
    } else {
        load_words<BITS>(unit + 2 * BITS * lane, words);
    }
    unpack_words<BITS>(words, pair);
}

// Entry of token 16 f + 8 i + g among a chunk's gains, outliers and channel numbers.
KVC_BOTH int token_entry(int token) { return 8 * (token % 8) + 2 * (token / 16) + token / 8 % 2; }

// 2^n for |n| up to 100.
KVC_DEVICE float power_of_two(int n) {
    union {
        uint32_t bits;
        float number;
    } power{static_cast<uint32_t>(127 + n) << 23};
    return power.number;
}

// The power of two that brings x to 2^top ... 2^(top + 1). With 14, half a half's range is left, and small numbers keep
// their digits.
KVC_DEVICE int up_to_top(float x, int top = 14) {
    union {
        float number;
        uint32_t bits;
    } whole{x};
    const int up = top - (static_cast<int>(whole.bits >> 23) - 127);
    return up > 100 ? 100 : up < -100 ? -100 : up;
}

struct Place {
    int byte;  // of the word in its unit
    int bit;
};

// Where a token's code of one channel (of eight) is.
KVC_BOTH Place place_of(bool keys, int bits, int token, int channel) {
    const int within = keys ? channel : token % 8, g = keys ? token % 8 : channel;
    const int lane = 4 * g + within / 2, e = within % 2, pair = token / 8;
    const int per_word = 16 / bits, word = pair / per_word;
    const int byte = bits == 16 ? 512 * (word / 4) + 16 * lane + 4 * (word % 4) : 2 * bits * lane + 4 * word;
    return {byte, 16 * e + bits * (pair % per_word)};
}

}  // namespace kvcompress::cuda
