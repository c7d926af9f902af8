// What the warps of a block need of its query rows in shared memory.
#pragma once

#include "cuda/core/rows.h"

namespace kvcompress::cuda {

// Rows as halves in the order of the second operand, accumulators' beginnings, factors, and float32 rows for outliers.
template <bool OUTLIERS>
KVC_DEVICE void prepare_rows(const AttendArgs& args, const Rows& rows, uint8_t* shared) {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const Side& side = args.pages.k;
    auto* halves = reinterpret_cast<uint16_t*>(shared + args.query_at);
    auto* start = reinterpret_cast<float*>(shared + args.start_at);
    auto* factor = reinterpret_cast<float*>(shared + args.factor_at);
    for (int row = warp; row < kRows; row += warps) {
        const bool used = row < rows.count;
        const float* query = args.query + (used ? rows.number(args, row) * side.rank : 0);
        float largest = 0;
        for (int tile = 0; tile < side.num_tiles; ++tile) {
            const Tile& it = side.tiles[tile];
            if (used && lane < kGroup * it.units) largest = fmaxf(largest, fabsf(query[it.channel + lane] * it.step));
        }
        largest = largest_lane(largest);
        const int up = up_to_top(largest);
        const float scale = power_of_two(up);
        float sums[3] = {0, 0, 0};  // of tiles in 8, 4 and 2 bits
        for (int tile = 0; tile < side.num_tiles; ++tile) {
            const Tile& it = side.tiles[tile];
            const bool there = used && lane < kGroup * it.units;
            const float x = there ? query[it.channel + lane] * scale : 0;
            if (OUTLIERS && side.outliers && there)
                reinterpret_cast<float*>(shared + args.exact_query_at)[kRows * (it.channel + lane) + row] = x;
            if (lane >= 16) continue;
            const uint16_t half = float_to_half(x * it.step);
            const int within = lane % kGroup;
            halves[((tile * 32 + 4 * row + within / 2) * 2 + lane / kGroup) * 2 + within % 2] = half;
            const float rounded = half_to_float(half);
            if (it.bits == 8) sums[0] += rounded;
            if (it.bits == 4) sums[1] += rounded;
            if (it.bits == 2) sums[2] += rounded;
        }
        KVC_UNROLL
        for (int lanes = 16; lanes; lanes /= 2)
            for (float& sum : sums) sum += shuffle_xor(sum, lanes);
        if (lane < kPairs)
            start[kRows * lane + row] =
                -((pair_offset<8>(lane) + middle(8)) * sums[0] + (pair_offset<4>(lane) + middle(4)) * sums[1] +
                  (pair_offset<2>(lane) + middle(2)) * sums[2]);
        if (lane == 0) factor[row] = args.softmax_scale * kLog2E * power_of_two(-up);
    }
}

}  // namespace kvcompress::cuda
