// One side of the cache in float32: codes of a tile of tokens are unpacked once and used for every row.
//
// A token's codes are read as 32-bit words. A word of b-bit codes has 32/b fields and field f of word w is channel
// w * 32/b + f, so one shift, one mask and one conversion give a vector of one field. Words past a band's end are
// padding: their query entries and their outputs are not used.
#pragma once

#include "cpu/core/codes.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// Positions of a side's channels once unpacked, padding included.
KVC_INLINE int float_positions(const kvc_side& side) {
    int positions = 0;
    for (int band = 0; band < side.num_bands; ++band)
        positions += round_up(words_of(side.bits[band], side.widths[band]), kLanes) * fields_of(side.bits[band]);
    return positions;
}

// Keys: out[position][tile], sixteen tokens of it; position = channel within its band, bands padded to whole words.
template <int BITS>
inline float* unpack_key_band(const uint8_t* codes, int64_t code_bytes, int bytes, float* out) {
    for (int byte = 0; byte < bytes; byte += 4) {
        alignas(kAlign) uint32_t words[kGroup] = {};
        for (int token = 0; token < kGroup; ++token) {
            const uint8_t* source = codes + token * code_bytes + byte;
            if (byte + 4 <= bytes)
                std::memcpy(&words[token], source, 4);
            else
                std::memcpy(&words[token], source, static_cast<size_t>(bytes - byte));
        }
        for (int lane = 0; lane < kGroup; lane += kLanes) {
            const VecU vector = load(words + lane);
            repeat<fields_of(BITS)>(
                [&](auto field) KVC_LAMBDA { store(out + field * kTile + lane, field_to_float<BITS>(vector, field)); });
        }
        out += fields_of(BITS) * kTile;
    }
    return out;
}

inline void unpack_keys(const kvc_side& side, const uint8_t* codes, float* out) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        out = with_bits(bits, [&](auto n) { return unpack_key_band<n>(codes, side.code_bytes, bytes, out); });
        codes += bytes;
    }
}

KVC_INLINE int key_positions(const kvc_side& side) {
    int positions = 0;
    for (int band = 0; band < side.num_bands; ++band)
        positions += words_of(side.bits[band], side.widths[band]) * fields_of(side.bits[band]);
    return positions;
}

// Values: out[token][position]; a band's vectors of words follow each other, field by field.
template <int BITS>
inline float* unpack_value_band(const uint8_t* codes, int bytes, float* out) {
    for (int byte = 0; byte < bytes; byte += 4 * kLanes) {
        VecU vector = {};
        if (byte + 4 * kLanes <= bytes)
            std::memcpy(&vector, codes + byte, sizeof vector);
        else
            std::memcpy(&vector, codes + byte, static_cast<size_t>(bytes - byte));
        repeat<fields_of(BITS)>([&](auto field)
                                    KVC_LAMBDA { store(out + field * kLanes, field_to_float<BITS>(vector, field)); });
        out += fields_of(BITS) * kLanes;
    }
    return out;
}

inline void unpack_value(const kvc_side& side, const uint8_t* codes, float* out) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], bytes = bits * side.widths[band] / 8;
        out = with_bits(bits, [&](auto n) { return unpack_value_band<n>(codes, bytes, out); });
        codes += bytes;
    }
}

// latent[channel] = at_position[...] * step.
inline void value_channels(const kvc_side& side, const float* at_position, float* latent) {
    for (int band = 0; band < side.num_bands; ++band) {
        const int fields = fields_of(side.bits[band]), width = side.widths[band];
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
        const int positions = words_of(side.bits[band], side.widths[band]) * fields_of(side.bits[band]);
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
KVC_INLINE void score_rows(const float* query, int query_stride, const float* keys, int positions, int tokens,
                           float* score) {
    for (int token = 0; token < tokens; token += kBlock * kLanes) {
        VecF sums[ROWS][kBlock];
        repeat<ROWS>([&](auto row) KVC_LAMBDA { repeat<kBlock>([&](auto n) KVC_LAMBDA { sums[row][n] = VecF{}; }); });
        for (int position = 0; position < positions; ++position) {
            const float* key = keys + position * kTile + token;
            VecF vectors[kBlock];
            repeat<kBlock>([&](auto n) KVC_LAMBDA { vectors[n] = load(key + n * kLanes); });
            repeat<ROWS>([&](auto row) KVC_LAMBDA {
                const float factor = query[row * query_stride + position];
                repeat<kBlock>([&](auto n) KVC_LAMBDA { sums[row][n] += vectors[n] * factor; });
            });
        }
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            repeat<kBlock>([&](auto n) KVC_LAMBDA { store(score + row * kTile + token + n * kLanes, sums[row][n]); });
        });
    }
}

inline void score_tile(const float* query, int query_stride, int rows, const float* keys, int positions, int tokens,
                       float* score) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows<4>(query + row * query_stride, query_stride, keys, positions, tokens, score + row * kTile);
    for (; row < rows; ++row)
        score_rows<1>(query + row * query_stride, query_stride, keys, positions, tokens, score + row * kTile);
}

// sums[row][position] = sums * decay[row] + sum_token weight[row][token] value[token][position]
template <int ROWS, int VECTORS>
KVC_INLINE void mix_rows(const float* weight, const float* decay, const float* values, int tokens, int positions,
                         float* sums) {
    VecF acc[ROWS][VECTORS];
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n)
                            KVC_LAMBDA { acc[row][n] = load(sums + row * positions + n * kLanes) * decay[row]; });
    });
    for (int token = 0; token < tokens; ++token) {
        const float* value = values + token * positions;
        VecF vectors[VECTORS];
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { vectors[n] = load(value + n * kLanes); });
        repeat<ROWS>([&](auto row) KVC_LAMBDA {
            const float factor = weight[row * kTile + token];
            repeat<VECTORS>([&](auto n) KVC_LAMBDA { acc[row][n] += vectors[n] * factor; });
        });
    }
    repeat<ROWS>([&](auto row) KVC_LAMBDA {
        repeat<VECTORS>([&](auto n) KVC_LAMBDA { store(sums + row * positions + n * kLanes, acc[row][n]); });
    });
}

template <int ROWS>
KVC_INLINE void mix_all(const float* weight, const float* decay, const float* values, int tokens, int positions,
                        int count, float* sums) {
    int position = 0;
    for (; position + kBlock * kLanes <= count; position += kBlock * kLanes)
        mix_rows<ROWS, kBlock>(weight, decay, values + position, tokens, positions, sums + position);
    for (; position < count; position += kLanes)
        mix_rows<ROWS, 1>(weight, decay, values + position, tokens, positions, sums + position);
}

// The first `count` of each token's and each row's positions.
inline void mix_tile(const float* weight, const float* decay, int rows, const float* values, int tokens, int positions,
                     int count, float* sums) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        mix_all<4>(weight + row * kTile, decay + row, values, tokens, positions, count, sums + row * positions);
    for (; row < rows; ++row)
        mix_all<1>(weight + row * kTile, decay + row, values, tokens, positions, count, sums + row * positions);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
