// Attention of a few query rows on the complete blocks that they see; rows, splits, warps and their merging are as in
// decode.h. A warp takes one block of one KV head at a time, in two copies: keys, then values.
#pragma once

#include "cuda/blocks/values.h"

namespace kvcompress::cuda {

// Queries as halves, in both orders of channels, and factors. The largest entry of a row is between 1/2 and 1: no
// product with a scale can then leave a half's range.
template <int BITS>
KVC_DEVICE void prepare_block_rows(const BlockArgs& args, const Rows& rows, uint8_t* shared) {
    const AttendArgs& attend = args.attend;
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32, rank = args.k.rank;
    auto* plain = reinterpret_cast<uint16_t*>(shared + attend.query_at);
    auto* coded = reinterpret_cast<uint16_t*>(shared + args.code_query_at);
    auto* factor = reinterpret_cast<float*>(shared + attend.factor_at);
    for (int row = warp; row < kRows; row += warps) {
        const bool used = row < rows.count;
        const float* query = attend.query + (used ? rows.number(attend, row) * rank : 0);
        float largest = 0;
        for (int channel = lane; channel < rank; channel += 32)
            if (used) largest = fmaxf(largest, fabsf(query[channel]));
        largest = largest_lane(largest);
        const int up = up_to_top(largest, -1);
        const float scale = power_of_two(up);
        for (int i = lane; i < kColumn * columns_of(rank); i += 32) {
            const int step = i / 16, t = i / 4 % 4, pair = i / 2 % 2, e = i % 2;
            const int at = ((step * 32 + 4 * row + t) * 2 + pair) * 2 + e;
            const int channel = 16 * step + 8 * pair + 2 * t + e;
            const int code = kColumn * (step / 4) + 16 * t + code_channel<BITS>(2 * (step % 4) + pair, e);
            plain[at] = float_to_half(used && channel < rank ? query[channel] * scale : 0);
            coded[at] = float_to_half(used && code < rank ? query[code] * scale : 0);
        }
        if (lane == 0) factor[row] = attend.softmax_scale * kLog2E * power_of_two(-up);
    }
}

template <int K_BITS, int V_BITS>
KVC_KERNEL(kMaxThreads)
decode_blocks(KVC_ARGUMENT(BlockArgs) args) {
    const AttendArgs& attend = args.attend;
    uint8_t* shared = shared_memory();
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int g = lane / 4, t = lane % 4;

    Rows rows{};
    if (!find_rows(attend, rows)) return;
    const int first_blocks = rows.visible(attend, 0) / kChunk, blocks = rows.visible(attend, rows.count - 1) / kChunk;
    const int share = (blocks + grid_x() - 1) / grid_x();
    const int begin = block_x() * share, end = begin + share < blocks ? begin + share : blocks;
    float* output = attend.output + block_x() * attend.rows * args.v.rank;
    float* lse = attend.lse + block_x() * attend.rows;
    if (begin >= end) {
        write_nothing(attend, rows, output, lse);
        return;
    }

    const int32_t* table = attend.table + block_z() * attend.table_stride;
    const int shift = attend.pages.page_shift, mask = (1 << shift) - 1;
    uint8_t* stages = shared + attend.stages_at;
    Pipeline pipeline(stages + warp * kStages * args.stage_bytes, reinterpret_cast<uint64_t*>(shared) + warp * kStages,
                      args.stage_bytes, lane);
    // Keys and values of the warp's first block, keys of its second: three copies are always on their way.
    static_assert(kStages == 3);
    int block = begin + warp;
    const uint8_t* next = block < end ? record_at(args, table[block >> shift], block & mask, rows.head) : nullptr;
    pipeline.request(next, args.k.bytes);
    pipeline.request(next ? next + args.k.bytes : nullptr, args.v.bytes);
    next = block + warps < end ? record_at(args, table[(block + warps) >> shift], (block + warps) & mask, rows.head)
                               : nullptr;
    pipeline.request(next, args.k.bytes);

    Sparse sparse(shared + args.scratch_at + warp * args.scratch_bytes, lane);
    if (args.k.outliers || args.v.outliers) sparse.clear_all();
    prepare_block_rows<K_BITS>(args, rows, shared);
    sync_block();  // queries and zeros are there

    const auto* plain_query = reinterpret_cast<const uint2*>(shared + attend.query_at);
    const auto* code_query = reinterpret_cast<const uint2*>(shared + args.code_query_at);
    const float2 factor = reinterpret_cast<const float2*>(shared + attend.factor_at)[t];
    const int visible0 = rows.visible(attend, 2 * t) / kChunk, visible1 = rows.visible(attend, 2 * t + 1) / kChunk;
    RunningSoftmax softmax;
    float o[kMaxColumns][4][4] = {};

    for (; block < end; block += warps) {
        const int later = block + 2 * warps;
        const int64_t later_page = later < end ? table[later >> shift] : 0;
        float s[4][4], decay[2];
        score_block<K_BITS>(args.k, pipeline.wait(), code_query, plain_query, sparse, lane, s);
        pipeline.release();
        pipeline.request(next ? next + args.k.bytes : nullptr, args.v.bytes);
        if (block >= first_blocks) {
            KVC_UNROLL
            for (int f = 0; f < 4; ++f) {
                if (block >= visible0) s[f][0] = s[f][2] = -INFINITY;
                if (block >= visible1) s[f][1] = s[f][3] = -INFINITY;
            }
        }
        softmax.take(s, factor, decay);
        uint32_t weights[4][2];
        KVC_UNROLL
        for (int f = 0; f < 4; ++f)
            weights[f][0] = transpose(halves_of(s[f][0], s[f][1])),
            weights[f][1] = transpose(halves_of(s[f][2], s[f][3]));
        mix_block<V_BITS>(args.v, pipeline.wait(), weights, sparse, lane, decay[0], decay[1], o);
        pipeline.release();
        next = later < end ? record_at(args, later_page, later & mask, rows.head) : nullptr;
        pipeline.request(next, args.k.bytes);
    }

    softmax.finish();
    sync_block();  // all warps are done with their blocks: sums go where these were
    auto* sums = reinterpret_cast<float*>(stages);
    KVC_UNROLL
    for (int column = 0; column < kMaxColumns; ++column) KVC_UNROLL
    for (int n = 0; n < 4; ++n) {
        const int channel = kColumn * column + 8 * g + 2 * n;
        if (channel >= args.v.rank) continue;
        float* row0 = sums + (warp * kRows + 2 * t) * args.v.rank + channel;
        float* row1 = row0 + args.v.rank;
        row0[0] = o[column][n][0], row0[1] = o[column][n][2];
        row1[0] = o[column][n][1], row1[1] = o[column][n][3];
    }
    if (g == 0) {
        float* own = sums + warps * kRows * args.v.rank + 2 * (warp * kRows + 2 * t);
        own[0] = softmax.largest[0], own[1] = softmax.sum[0], own[2] = softmax.largest[1], own[3] = softmax.sum[1];
    }
    sync_block();  // every warp's sums are there
    merge_warps(attend, rows, sums, nullptr, output, lse);
}

}  // namespace kvcompress::cuda
