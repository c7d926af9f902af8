// A warp's own ring of chunks on their way from memory: by the copy engine on sm_90, by the lanes before.
#pragma once

#include "cuda/core/device.h"

namespace kvcompress::cuda {

constexpr int kStages = 3;

class Pipeline {
 public:
    // `memory` has kStages chunks, `barriers` as many words; both are the warp's own.
    KVC_DEVICE Pipeline(uint8_t* memory, uint64_t* barriers, int chunk_bytes, int lane)
        : memory_(memory), barriers_(barriers), chunk_bytes_(chunk_bytes), lane_(lane) {
#if KVC_BULK_COPIES
        if (lane == 0) {
            for (int stage = 0; stage < kStages; ++stage) init_barrier(barriers_ + stage);
            publish_barriers();
        }
        sync_warp();
#endif
    }

    // Ask for the next chunk in the order of `wait`; null keeps the count where there are no more.
    KVC_DEVICE void request(const uint8_t* chunk) { request(chunk, chunk_bytes_); }

    // The same for one that is smaller than its place.
    KVC_DEVICE void request(const uint8_t* chunk, int bytes) {
        uint8_t* to = memory_ + asked_ * chunk_bytes_;
#if KVC_BULK_COPIES
        if (chunk && lane_ == 0) copy_bulk(to, chunk, bytes, barriers_ + asked_);
#else
        if (chunk)
            for (int at = 16 * lane_; at < bytes; at += 512) copy_16_bytes(to + at, chunk + at);
        commit_copies();
#endif
        asked_ = asked_ + 1 == kStages ? 0 : asked_ + 1;
    }

    // The oldest chunk asked for. Its place is the next one to be asked for: release it first.
    KVC_DEVICE uint8_t* wait() {
#if KVC_BULK_COPIES
        wait_barrier(barriers_ + waited_, parity_);
#else
        wait_copies_but<kStages - 1>();
        sync_warp();
#endif
        uint8_t* chunk = memory_ + waited_ * chunk_bytes_;
        if (++waited_ == kStages) waited_ = 0, parity_ ^= 1;
        return chunk;
    }

    // All lanes have read it.
    KVC_DEVICE void release() { sync_warp(); }

 private:
    uint8_t* memory_;
    uint64_t* barriers_;
    int chunk_bytes_, lane_;
    int asked_ = 0, waited_ = 0;
    uint32_t parity_ = 0;
};

}  // namespace kvcompress::cuda
