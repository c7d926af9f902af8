// One side of the cache in float32: codes of a tile of tokens are unpacked once and used for every row.
//
// A token's codes are read as 32-bit words. A word of b-bit codes has 32/b fields and field f of word w is channel
// w * 32/b + f, so one shift, one mask and one conversion give a vector of one field. Words past a band's end are
// padding: their query entries and their outputs are not used.
#pragma once

#include "vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

KVC_INLINE int words_of(int bits, int width) { return round_up(bits * width / 8, 4) / 4; }
KVC_INLINE float middle_of(int bits) { return bits == 16 ? 0.f : static_cast<float>((1 << bits) - 1) / 2; }

KVC_INLINE VecF field_to_float(VecU word, int bits, int field) {
    const VecU code = word >> static_cast<uint32_t>(bits * field) & ((1u << bits) - 1u);
    if (bits == 16) return half_to_float(code);
    return __builtin_convertvector(reinterpret_cast<const VecI&>(code), VecF) - middle_of(bits);
}

// Positions of a side's channels once unpacked, padding included.
KVC_INLINE int float_positions(const kvc_side& side) {
    int positions = 0;
    for (int band = 0; band < side.num_bands; ++band)
        positions += round_up(words_of(side.bits[band], side.widths[band]), kLanes) * (32 / side.bits[band]);
    return positions;
}

inline void read_words(const uint8_t* bytes, int count, uint32_t* words) {
    words[(count - 1) / 4] = 0;
    std::memcpy(words, bytes, static_cast<size_t>(count));
}

// Keys: out[position][tile], sixteen tokens of it; position = channel within its band, bands padded to whole words.
inline void unpack_keys(const kvc_side& side, const uint8_t* codes, float* out) {
    alignas(kAlign) uint32_t words[kMaxHeadDim / 2][kGroup];
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        const int num_words = words_of(bits, side.widths[band]);
        for (int token = 0; token < kGroup; ++token) {
            const uint8_t* source = codes + token * side.code_bytes;
            int word = 0;
            for (; 4 * word + 4 <= bytes; ++word) std::memcpy(&words[word][token], source + 4 * word, 4);
            if (word < num_words) read_words(source + 4 * word, bytes - 4 * word, &words[word][token]);
        }
        for (int word = 0; word < num_words; ++word)
            for (int field = 0; field < 32 / bits; ++field, out += kTile)
                for (int lane = 0; lane < kGroup; lane += kLanes)
                    store(out + lane, field_to_float(load(words[word] + lane), bits, field));
        codes += bytes;
    }
}

KVC_INLINE int key_positions(const kvc_side& side) {
    int positions = 0;
    for (int band = 0; band < side.num_bands; ++band)
        positions += words_of(side.bits[band], side.widths[band]) * (32 / side.bits[band]);
    return positions;
}

// Values: out[token][position]; a band's vectors of words follow each other, field by field.
inline void unpack_value(const kvc_side& side, const uint8_t* codes, float* out) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        for (int byte = 0; byte < bytes; byte += 4 * kLanes) {
            alignas(kAlign) uint32_t words[kLanes] = {};
            std::memcpy(words, codes + byte, static_cast<size_t>(min_of(bytes - byte, 4 * kLanes)));
            const VecU vector = load(words);
            for (int field = 0; field < 32 / bits; ++field, out += kLanes) store(out, field_to_float(vector, bits, field));
        }
        codes += bytes;
    }
}

// latent[channel] = at_position[...] * step.
inline void value_channels(const kvc_side& side, const float* at_position, float* latent) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int fields = 32 / side.bits[band], width = side.widths[band];
        for (int channel = 0; channel < width; ++channel) {
            const int word = channel / fields, field = channel % fields;
            latent[channel] = at_position[(word / kLanes * fields + field) * kLanes + word % kLanes] * side.steps[band];
        }
        at_position += round_up(words_of(side.bits[band], width), kLanes) * fields;
        latent += width;
    }
}

// Steps folded into the absorbed query, padding zero.
inline void key_query(const kvc_side& side, const float* absorbed, float* query) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int positions = words_of(side.bits[band], side.widths[band]) * (32 / side.bits[band]);
        for (int channel = 0; channel < positions; ++channel)
            query[channel] = channel < side.widths[band] ? absorbed[channel] * side.steps[band] : 0.f;
        absorbed += side.widths[band];
        query += positions;
    }
}

#if KVC_LANES == 4
constexpr int kBlock = 2;  // 16 registers: 4 rows x 2 vectors of sums
#elif KVC_LANES == 8
constexpr int kBlock = 2;
#else
constexpr int kBlock = 4;
#endif

// score[row][token] = sum_position query[row][position] key[position][token]
template <int ROWS>
KVC_INLINE void score_rows(const float* query, int query_stride, const float* keys, int positions, int tokens, float* score) {
    for (int token = 0; token < tokens; token += kBlock * kLanes) {
        VecF sums[ROWS][kBlock];
        KVC_UNROLL for (int row = 0; row < ROWS; ++row)
            KVC_UNROLL for (int n = 0; n < kBlock; ++n) sums[row][n] = VecF{};
        for (int position = 0; position < positions; ++position) {
            const float* key = keys + position * kTile + token;
            KVC_UNROLL for (int row = 0; row < ROWS; ++row)
                KVC_UNROLL for (int n = 0; n < kBlock; ++n)
                    sums[row][n] += load(key + n * kLanes) * query[row * query_stride + position];
        }
        KVC_UNROLL for (int row = 0; row < ROWS; ++row)
            KVC_UNROLL for (int n = 0; n < kBlock; ++n) store(score + row * kTile + token + n * kLanes, sums[row][n]);
    }
}

inline void score_tile(const float* query, int query_stride, int rows, const float* keys, int positions, int tokens, float* score) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows<4>(query + row * query_stride, query_stride, keys, positions, tokens, score + row * kTile);
    for (; row < rows; ++row)
        score_rows<1>(query + row * query_stride, query_stride, keys, positions, tokens, score + row * kTile);
}

// sums[row][position] = sums * decay[row] + sum_token weight[row][token] value[token][position]
template <int ROWS, int VECTORS>
KVC_INLINE void mix_rows(const float* weight, const float* decay, const float* values, int tokens, int positions, float* sums) {
    VecF acc[ROWS][VECTORS];
    KVC_UNROLL for (int row = 0; row < ROWS; ++row)
        KVC_UNROLL for (int n = 0; n < VECTORS; ++n) acc[row][n] = load(sums + row * positions + n * kLanes) * decay[row];
    for (int token = 0; token < tokens; ++token)
        KVC_UNROLL for (int row = 0; row < ROWS; ++row)
            KVC_UNROLL for (int n = 0; n < VECTORS; ++n)
                acc[row][n] += load(values + token * positions + n * kLanes) * weight[row * kTile + token];
    KVC_UNROLL for (int row = 0; row < ROWS; ++row)
        KVC_UNROLL for (int n = 0; n < VECTORS; ++n) store(sums + row * positions + n * kLanes, acc[row][n]);
}

template <int ROWS>
KVC_INLINE void mix_all(const float* weight, const float* decay, const float* values, int tokens, int positions, float* sums) {
    int position = 0;
    for (; position + kBlock * kLanes <= positions; position += kBlock * kLanes)
        mix_rows<ROWS, kBlock>(weight, decay, values + position, tokens, positions, sums + position);
    for (; position < positions; position += kLanes)
        mix_rows<ROWS, 1>(weight, decay, values + position, tokens, positions, sums + position);
}

inline void mix_tile(const float* weight, const float* decay, int rows, const float* values, int tokens, int positions, float* sums) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        mix_all<4>(weight + row * kTile, decay + row, values, tokens, positions, sums + row * positions);
    for (; row < rows; ++row)
        mix_all<1>(weight + row * kTile, decay + row, values, tokens, positions, sums + row * positions);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
