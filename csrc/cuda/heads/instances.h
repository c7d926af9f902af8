// Which kernels are compiled. Decoding has an instance, and a file decode_*.cu, for every pair of widths below, of keys
// and of values; (0, 0) takes bands of any widths and any number of channels up to 256.
#pragma once

#include "cuda/heads/decode.h"

#define KVC_DECODE_INSTANCES(X) X(16, 16) X(8, 8) X(8, 4) X(4, 4) X(4, 2) X(2, 2) X(0, 0)

namespace kvcompress::cuda {

struct LaunchShape {
    Grid grid;
    int threads;
    int64_t shared_bytes;
    void* stream;
};

// Defined in start_decode.h.
template <int K_BITS, int V_BITS>
int start_decode(const LaunchShape& shape, bool outliers, const AttendArgs& args);

#define KVC_DECLARE(k_bits, v_bits) extern template int start_decode<k_bits, v_bits>(const LaunchShape&, bool, const AttendArgs&);
KVC_DECODE_INSTANCES(KVC_DECLARE)
#undef KVC_DECLARE

// Whether an instance for uniform widths has kernels for sides of this many tiles. Of 256 channels and outliers there is
// little call for: (0, 0) takes them.
constexpr bool has_tiles(int tiles, bool outliers) { return tiles == 4 || tiles == 8 || (tiles == 16 && !outliers); }

}  // namespace kvcompress::cuda
