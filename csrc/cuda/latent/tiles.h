// A block's ring of tiles, each TOKENS tokens of a request: read from memory once, for all warps. By the copy engine on
// sm_90, a token at a time; by the lanes before. Tokens past the end are zeros.
#pragma once

#include "cuda/latent/args.h"

namespace kvcompress::cuda {

template <int TOKENS>
class Tiles {
    static constexpr int kLanes = kLatentThreads / TOKENS;  // of one token

 public:
    // Tiles from `first` on, of tokens below `end`. `memory` has `stages` tiles, `barriers` as many words. Every thread of
    // the block makes one, and they meet before the first request.
    KVC_DEVICE Tiles(const LatentArgs& args, const int32_t* table, uint8_t* memory, uint64_t* barriers, int first,
                     int end)
        : args_(args), table_(table), memory_(memory), barriers_(barriers), next_token_(TOKENS * first), end_(end) {
#if KVC_BULK_COPIES
        if (thread_index() == 0) {
            for (int stage = 0; stage < args.stages; ++stage) init_barrier(barriers_ + stage);
            publish_barriers();
        }
#endif
        const int token = next_token_ + thread_index() / kLanes;
        index_ = token / args.block_size, within_ = token % args.block_size;
        look_up();
    }

    KVC_DEVICE static constexpr int bytes(int token_bytes) { return TOKENS * (token_bytes + kTokenPadding); }

    // Ask for the next tile, into the place of the one waited for longest ago: nobody may be reading that one. Called by
    // all threads; where there is no next tile, it only keeps count.
    KVC_DEVICE void request() {
        if (next_token_ < end_) {
            const int token = next_token_ + thread_index() / kLanes, part = thread_index() % kLanes;
            uint8_t* to = memory_ + asked_ * bytes(args_.token_bytes) +
                          thread_index() / kLanes * (args_.token_bytes + kTokenPadding);
            const uint8_t* from = args_.pages + block_ * args_.block_stride + within_ * args_.token_stride;
#if KVC_BULK_COPIES
            if (thread_index() == 0) {
                const int left = end_ - next_token_;
                expect_bytes(barriers_ + asked_, (left < TOKENS ? left : TOKENS) * args_.token_bytes);
            }
            if (token < end_ && part == 0) copy_bulk_of(to, from, args_.token_bytes, barriers_ + asked_);
#else
            if (token < end_)
                for (int at = 16 * part; at < args_.token_bytes; at += 16 * kLanes) copy_16_bytes(to + at, from + at);
#endif
            if (token >= end_)
                for (int at = 16 * part; at < args_.token_bytes; at += 16 * kLanes)
                    *reinterpret_cast<uint4*>(to + at) = {0, 0, 0, 0};
        }
#if !KVC_BULK_COPIES
        commit_copies();
#endif
        asked_ = asked_ + 1 == args_.stages ? 0 : asked_ + 1;
        next_token_ += TOKENS, within_ += TOKENS;
        while (within_ >= args_.block_size) within_ -= args_.block_size, ++index_;
        look_up();
    }

    // The thread's own part of the tile that `wait` gives next is there; others know after the block has met. Between
    // them, `stages` - 1 tiles have been asked for.
    KVC_DEVICE void settle() {
#if !KVC_BULK_COPIES
        if (args_.stages == 2)
            wait_copies_but<0>();
        else if (args_.stages == 3)
            wait_copies_but<1>();
        else
            wait_copies_but<kMostTilesAhead - 1>();
#endif
    }

    // The oldest tile asked for.
    KVC_DEVICE const uint8_t* wait() {
#if KVC_BULK_COPIES
        wait_barrier(barriers_ + waited_, parity_);
#endif
        const uint8_t* tile = memory_ + waited_ * bytes(args_.token_bytes);
        if (++waited_ == args_.stages) waited_ = 0, parity_ ^= 1;
        return tile;
    }

 private:
    // The block of the thread's token of the next tile, a tile before that is asked for: it takes its time.
    KVC_DEVICE void look_up() {
        if (next_token_ + thread_index() / kLanes < end_) block_ = table_[index_];
    }

    const LatentArgs& args_;
    const int32_t* table_;
    uint8_t* memory_;
    uint64_t* barriers_;
    int next_token_, end_;
    int64_t block_ = 0;
    int index_, within_;  // of the thread's token of the next tile: block of the request, place in the block
    int asked_ = 0, waited_ = 0;
    uint32_t parity_ = 0;
};

}  // namespace kvcompress::cuda
