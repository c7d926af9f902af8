// The decode kernels of one pair of widths, which a decode_*.cu each compiles.
#pragma once

#include "cuda/heads/decode.h"
#include "cuda/heads/instances.h"

namespace kvcompress::cuda {

template <int K_BITS, int V_BITS>
int start_decode(const LaunchShape& shape, bool outliers, const AttendArgs& args) {
    const auto start = [&](auto tiles, auto has_outliers) {
        return launch<decode<K_BITS, V_BITS, tiles.value, has_outliers.value>>(shape.grid, shape.threads,
                                                                               shape.shared_bytes, shape.stream, args);
    };
    const auto with_tiles = [&](auto has_outliers) {
        const int tiles =
            args.pages.k.num_tiles > args.pages.v.num_tiles ? args.pages.k.num_tiles : args.pages.v.num_tiles;
        if constexpr (K_BITS == 0) {
            return tiles > kUsualTiles ? start(Bits<kMaxTiles>{}, has_outliers)
                                       : start(Bits<kUsualTiles>{}, has_outliers);
        } else {
            if constexpr (has_tiles(16, has_outliers.value))
                if (tiles == 16) return start(Bits<16>{}, has_outliers);
            return tiles == 4 ? start(Bits<4>{}, has_outliers) : start(Bits<8>{}, has_outliers);
        }
    };
    if constexpr (K_BITS == 16)
        return with_tiles(Bits<false>{});
    else
        return outliers ? with_tiles(Bits<true>{}) : with_tiles(Bits<false>{});
}

}  // namespace kvcompress::cuda
