// Pages in fragment order, as kvcompress/codec/heads/fragment.py specifies it: where codes and tokens' numbers lie.
#pragma once

#include "cuda/core/codes.h"

namespace kvcompress::cuda {

KVC_BOTH int unit_bytes(int bits) { return kChunk * bits; }

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
