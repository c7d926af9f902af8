// The outliers of a block, as a dense matrix of halves for the tensor core: a column at a time, a warp puts what its
// scratch memory lacks of zeros there, multiplies, and takes it out again.
#pragma once

#include "cuda/blocks/pages.h"

namespace kvcompress::cuda {

constexpr int kScratchEntries = kChunk * kColumn;
constexpr int kScratchBits = 12;
static_assert(1 << kScratchBits == kScratchEntries);

// Where a token's channel is in the first operand's order: keys are tokens x channels, values channels x tokens.
template <bool KEYS>
KVC_DEVICE int scratch_place(int token, int channel) {
    const int f = token / 16, i = token / 8 % 2, x = row_of(token % 8);
    int tile, lane, word, e;
    if (KEYS)
        tile = channel / 16, lane = 4 * x + channel / 2 % 4, word = i + 2 * (channel / 8 % 2), e = channel % 2;
    else
        tile = channel % 8 / 2, lane = 4 * (channel / 8) + x / 2, word = channel % 2 + 2 * i, e = x % 2;
    return ((f * 4 + tile) * 32 + lane) * 8 + 2 * word + e;
}

// Lanes take outliers by pairs, of which there are whole numbers. What a lane notes only the same lane reads again.
class Sparse {
 public:
    // `scratch` is the warp's own: zeros, then room for the places of the outliers.
    KVC_DEVICE Sparse(uint8_t* scratch, int lane)
        : matrix_(reinterpret_cast<uint16_t*>(scratch)),
          places_(reinterpret_cast<uint32_t*>(matrix_ + kScratchEntries) + lane),
          lane_(lane) {}

    // Called once, before all else.
    KVC_DEVICE void clear_all() {
        KVC_ROLLED
        for (int i = lane_; i < kScratchEntries / 8; i += 32) reinterpret_cast<uint4*>(matrix_)[i] = uint4{0, 0, 0, 0};
    }

    // A block's outliers.
    template <bool KEYS>
    KVC_DEVICE void read(const BlockSide& side, const uint8_t* part) {
        values_ = reinterpret_cast<const uint32_t*>(part + side.value_offset) + lane_;
        const auto* places = reinterpret_cast<const uint32_t*>(part + side.place_offset) + lane_;
        pairs_ = side.outliers / 2 - lane_;
        const auto last = static_cast<uint32_t>(kChunk * side.rank - 1);
        KVC_ROLLED
        for (int n = 0; n < pairs_; n += 32) {
            const uint32_t pair = places[n];
            places_[n] = note<KEYS>(side, last, pair & 0xffff) | note<KEYS>(side, last, pair >> 16) << 16;
        }
        sync_warp();  // lanes with fewer have waited: products want all at once
    }

    KVC_DEVICE void put(int column) {
        KVC_ROLLED
        for (int n = 0; n < pairs_; n += 32) {
            const uint32_t pair = places_[n], value = values_[n];
            set(column, pair & 0xffff, static_cast<uint16_t>(value));
            set(column, pair >> 16, static_cast<uint16_t>(value >> 16));
        }
        sync_warp();  // all are there before any lane loads
    }

    // The first operand of tile `tile` of tokens 16 f ...
    KVC_DEVICE uint4 load(int f, int tile) const {
        return reinterpret_cast<const uint4*>(matrix_)[(4 * f + tile) * 32 + lane_];
    }

    KVC_DEVICE void take(int column) {
        sync_warp();  // all lanes have loaded
        KVC_ROLLED
        for (int n = 0; n < pairs_; n += 32) {
            const uint32_t pair = places_[n];
            set(column, pair & 0xffff, 0);
            set(column, pair >> 16, 0);
        }
        sync_warp();  // all are gone before another column's come
    }

 private:
    // The column and the place in it, of an outlier's place in the block.
    template <bool KEYS>
    KVC_DEVICE uint32_t note(const BlockSide& side, uint32_t last, uint32_t place) const {
        if (place > last) place = last;  // a damaged page may name a place that is not there
        const auto token = static_cast<int>(static_cast<uint64_t>(place) * side.reciprocal >> 32);
        const int channel = static_cast<int>(place) - token * side.rank;
        return static_cast<uint32_t>(channel / kColumn << kScratchBits | scratch_place<KEYS>(token, channel % kColumn));
    }

    KVC_DEVICE void set(int column, uint32_t noted, uint16_t value) {
        const uint32_t place = noted ^ static_cast<uint32_t>(column) << kScratchBits;
        if (place < kScratchEntries) matrix_[place] = value;
    }

    uint16_t* matrix_;
    uint32_t* places_;
    const uint32_t* values_ = nullptr;
    int lane_, pairs_ = 0;
};

}  // namespace kvcompress::cuda
