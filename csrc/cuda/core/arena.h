#pragma once

#include <cstdint>

namespace kvcompress::cuda {

// Parts of a block's shared memory, one after the other, each on a multiple of 128 bytes.
struct Arena {
    int64_t used = 0;

    int take(int64_t bytes) {
        const int64_t start = used;
        used = (start + bytes + 127) / 128 * 128;
        return static_cast<int>(start);
    }
};

}  // namespace kvcompress::cuda
