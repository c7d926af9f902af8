// Which kernels are compiled: decoding has an instance, and a file decode_*.cu, for every listed pair of widths.
#pragma once

#include "cuda/core/launch.h"

namespace kvcompress::cuda {

// Defined in start_decode.h.
template <int K_BITS, int V_BITS>
int start_decode(const LaunchShape& shape, bool outliers, const AttendArgs& args);

#define KVC_DECLARE(k_bits, v_bits) \
    extern template int start_decode<k_bits, v_bits>(const LaunchShape&, bool, const AttendArgs&);
KVC_HEADS_CUDA_WIDTHS(KVC_DECLARE)
#undef KVC_DECLARE

// Whether an instance for uniform widths has kernels for sides of this many tiles. Of 256 channels and outliers there is
// little call for: (0, 0) takes them.
constexpr bool has_tiles(int tiles, bool outliers) { return tiles == 4 || tiles == 8 || (tiles == 16 && !outliers); }

}  // namespace kvcompress::cuda
