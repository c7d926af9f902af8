// Attention of a few query rows on pages in fragment order.
//
// A block takes eight rows (query heads of one KV head, of one or more query tokens) and one split of a request's chunks.
// Its warps go through chunks independently, each with sums of its own, and are merged at the end; splits are merged by
// `combine`. The rows are the second operand of the tensor core, 16 tokens x 16 channels of keys, then 16 channels x 16
// tokens of values, the first. Codes become halves by logic operations and are never scaled:
//
//   scores   s = gain_t (sum_c half_tc q_c - sum_c (offset + middle) q_c): the second sum is the same for every token
//            with the same offset, so the accumulators begin with it;
//   values   o_c = sum_t half_ct (p gain)_t - sum_t (offset + middle) (p gain)_t: the second sum is the same for every
//            channel of a band, so one product with a constant tile per chunk makes it for all; o is rescaled and grown
//            chunk by chunk, and the large offsets cancel before they meet it.
//
// q carries the static scale and the step; a power of two per row keeps it in a half's range, and is undone for free
// where the exponential scales scores anyway. Outliers are added in float32 by ordinary instructions.
#pragma once

#include "cuda/core/merge.h"
#include "cuda/core/pipeline.h"
#include "cuda/core/softmax.h"
#include "cuda/heads/fragments.h"
#include "cuda/heads/outliers.h"
#include "cuda/heads/queries.h"

namespace kvcompress::cuda {

// The units of a tile. Without a second one its halves are zero.
template <int BITS, bool WHOLE>
KVC_DEVICE void unpack_tile(const uint8_t* chunk, const Tile& tile, int lane, uint32_t (&first)[kPairs],
                            uint32_t (&second)[kPairs]) {
    unpack<BITS>(chunk + tile.offset, lane, first);
    if (WHOLE || tile.units == 2) {
        unpack<BITS>(chunk + tile.offset + unit_bytes(BITS), lane, second);
    } else {
        KVC_UNROLL
        for (int i = 0; i < kPairs; ++i) second[i] = 0;
    }
}

// A lane's eight entries of a part with one half per token.
KVC_DEVICE void load_tokens(const uint8_t* part, int g, float (&x)[kPairs]) {
    const uint4 w = reinterpret_cast<const uint4*>(part)[g];
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
    KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
        x[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
}

// 16-bit values of tokens from the given one on become zero, because they may be NaN: a lane clears its own.
KVC_DEVICE void clear_after(const Side& side, uint8_t* chunk, int tokens, int lane) {
    KVC_ROLLED
    for (int unit = 0; unit < side.rank / kGroup; ++unit) {
        auto* words = reinterpret_cast<uint32_t*>(chunk + side.tiles[0].offset + unit * unit_bytes(16)) + 4 * lane;
        KVC_ROLLED
        for (int j = 0; j < kPairs; ++j) {
            const int left = tokens - (8 * j + 2 * (lane % 4));
            uint32_t& word = words[128 * (j / 4) + j % 4];
            word = left <= 0 ? 0 : left == 1 ? word & 0xffff : word;
        }
    }
}

// Bits are those of all keys and all values, which then fill TILES tiles; 0 for bands of any number.
template <int K_BITS, int V_BITS, int TILES, bool OUTLIERS>
KVC_KERNEL(kMaxThreads)
decode(KVC_ARGUMENT(AttendArgs) args) {
    constexpr bool kWhole = K_BITS != 0 && V_BITS != 0;
    uint8_t* shared = shared_memory();
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int g = lane / 4, t = lane % 4;
    const Side &k = args.pages.k, &v = args.pages.v;

    Rows rows{};
    if (!find_rows(args, rows)) return;
    const int first_visible = rows.visible(args, 0), last_visible = rows.visible(args, rows.count - 1);
    const int chunks = (last_visible + kChunk - 1) / kChunk, share = (chunks + grid_x() - 1) / grid_x();
    const int begin = block_x() * share, end = begin + share < chunks ? begin + share : chunks;
    float* output = args.output + block_x() * args.rows * v.rank;
    float* lse = args.lse + block_x() * args.rows;
    if (begin >= end) {
        write_nothing(args, rows, output, lse);
        return;
    }

    const int32_t* table = args.table + block_z() * args.table_stride;
    const int page_mask = (1 << args.pages.page_shift) - 1;
    uint8_t* stages = shared + args.stages_at;
    Pipeline pipeline(stages + warp * kStages * args.pages.chunk_bytes,
                      reinterpret_cast<uint64_t*>(shared) + warp * kStages, args.pages.chunk_bytes, lane);
    for (int i = 0; i < kStages; ++i) {
        const int chunk = begin + warp + i * warps;
        pipeline.request(chunk < end
                             ? chunk_at(args.pages, table[chunk >> args.pages.page_shift], chunk & page_mask, rows.head)
                             : nullptr);
    }

    prepare_rows<OUTLIERS>(args, rows, shared);
    auto* exact_sums = reinterpret_cast<float*>(shared + args.exact_sum_at) + warp * kRows * v.rank;
    if (OUTLIERS && v.outliers)
        for (int i = lane; i < kRows * v.rank; i += 32) exact_sums[i] = 0;
    sync_block();

    const auto* queries = reinterpret_cast<const uint2*>(shared + args.query_at);
    const auto* starts = reinterpret_cast<const float2*>(shared + args.start_at);
    const auto* exact_query = reinterpret_cast<const float2*>(shared + args.exact_query_at);
    const float2 factor = reinterpret_cast<const float2*>(shared + args.factor_at)[t];
    const int visible0 = rows.visible(args, 2 * t), visible1 = rows.visible(args, 2 * t + 1);
    RunningSoftmax softmax;
    float o[TILES][4];
    KVC_UNROLL
    for (int tile = 0; tile < TILES; ++tile) o[tile][0] = o[tile][1] = o[tile][2] = o[tile][3] = 0;

    for (int chunk = begin + warp; chunk < end; chunk += warps) {
        const int later = chunk + kStages * warps;
        const int64_t later_block = later < end ? table[later >> args.pages.page_shift] : 0;
        uint8_t* record = pipeline.wait();
        const int here = kChunk * chunk;  // first token

        // Scores of tokens 8 j + g, rows 2 t and 2 t + 1: s[j / 2][2 (j % 2) + ...].
        float s[4][4];
        KVC_UNROLL
        for (int j = 0; j < kPairs; ++j) {
            const float2 start = starts[kRows / 2 * j + t];
            s[j / 2][2 * (j % 2)] = start.x, s[j / 2][2 * (j % 2) + 1] = start.y;
        }
        KVC_UNROLL
        for (int tile = 0; tile < TILES; ++tile)
            if (kWhole || tile < k.num_tiles)
                with_bits<K_BITS>(k.tiles[tile].bits, [&](auto bits) {
                    uint32_t low[kPairs], high[kPairs];  // the tile's first and last eight channels
                    unpack_tile<bits.value, kWhole>(record, k.tiles[tile], lane, low, high);
                    const uint2 q = queries[32 * tile + lane];
                    const uint32_t b[2] = {q.x, q.y};
                    KVC_UNROLL
                    for (int f = 0; f < 4; ++f) mma(s[f], low[2 * f], low[2 * f + 1], high[2 * f], high[2 * f + 1], b);
                });
        if (K_BITS != 16 && k.gain_offset >= 0) {
            float gain[kPairs];
            load_tokens(record + k.gain_offset, g, gain);
            KVC_UNROLL
            for (int j = 0; j < kPairs; ++j) s[j / 2][2 * (j % 2)] *= gain[j], s[j / 2][2 * (j % 2) + 1] *= gain[j];
        }
        if (OUTLIERS && k.outliers) add_exact_scores(k, record, exact_query, lane, s);
        const bool ends = here + kChunk > first_visible;
        if (ends) {
            KVC_UNROLL
            for (int j = 0; j < kPairs; ++j) {
                const int token = here + 8 * j + g;
                if (token >= visible0) s[j / 2][2 * (j % 2)] = -INFINITY;
                if (token >= visible1) s[j / 2][2 * (j % 2) + 1] = -INFINITY;
            }
        }

        float decay[2];
        softmax.take(s, factor, decay);

        if (OUTLIERS && v.outliers)
            add_exact_values(v, record, rows.length - here, lane, s, decay[0], decay[1], exact_sums);

        // Weights of values, tokens to the depth of the second operand.
        uint32_t weights[4][2];
        if (V_BITS != 16 && v.gain_offset >= 0) {
            float gain[kPairs];
            load_tokens(record + v.gain_offset, g, gain);
            if (ends) {
                // What was never written may be infinite, and would not vanish with its probability.
                KVC_UNROLL
                for (int j = 0; j < kPairs; ++j)
                    if (here + 8 * j + g >= rows.length) gain[j] = 0;
            }
            KVC_UNROLL
            for (int j = 0; j < kPairs; ++j) s[j / 2][2 * (j % 2)] *= gain[j], s[j / 2][2 * (j % 2) + 1] *= gain[j];
        }
        KVC_UNROLL
        for (int f = 0; f < 4; ++f) {
            weights[f][0] = transpose(halves_of(s[f][0], s[f][1]));
            weights[f][1] = transpose(halves_of(s[f][2], s[f][3]));
        }
        if ((V_BITS == 16 || V_BITS == 0) && v.gain_offset < 0 && ends)
            clear_after(v, record, rows.length - here, lane);

        float offsets[V_BITS == 0 ? 3 : 1][4] = {};
        if constexpr (V_BITS == 0) {
            if (v.gain_offset >= 0) {
                subtract_offsets<8>(weights, offsets[0]);
                subtract_offsets<4>(weights, offsets[1]);
                subtract_offsets<2>(weights, offsets[2]);
            }
        } else if constexpr (V_BITS != 16) {
            subtract_offsets<V_BITS>(weights, offsets[0]);
        }
        KVC_UNROLL
        for (int tile = 0; tile < TILES; ++tile)
            if (kWhole || tile < v.num_tiles)
                with_bits<V_BITS>(v.tiles[tile].bits, [&](auto bits) {
                    constexpr int kKind = V_BITS != 0 || bits.value == 8 ? 0 : bits.value == 4 ? 1 : 2;
                    uint32_t low[kPairs], high[kPairs];
                    unpack_tile<bits.value, kWhole>(record, v.tiles[tile], lane, low, high);
                    float sum[4];
                    KVC_UNROLL
                    for (int i = 0; i < 4; ++i) sum[i] = bits.value == 16 ? 0 : offsets[kKind][i];
                    KVC_UNROLL
                    for (int f = 0; f < 4; ++f)
                        mma(sum, low[2 * f], high[2 * f], low[2 * f + 1], high[2 * f + 1], weights[f]);
                    o[tile][0] = o[tile][0] * decay[0] + sum[0], o[tile][1] = o[tile][1] * decay[1] + sum[1];
                    o[tile][2] = o[tile][2] * decay[0] + sum[2], o[tile][3] = o[tile][3] * decay[1] + sum[3];
                });

        pipeline.release();
        pipeline.request(later < end ? chunk_at(args.pages, later_block, later & page_mask, rows.head) : nullptr);
    }

    softmax.finish();
    sync_block();  // sums go where chunks were
    auto* sums = reinterpret_cast<float*>(stages);
    KVC_UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        if (kWhole || tile < v.num_tiles) {
            const Tile& it = v.tiles[tile];
            float* row0 = sums + (warp * kRows + 2 * t) * v.rank + it.channel + g;
            float* row1 = row0 + v.rank;
            row0[0] = o[tile][0] * it.step, row1[0] = o[tile][1] * it.step;
            if (kWhole || it.units == 2) row0[kGroup] = o[tile][2] * it.step, row1[kGroup] = o[tile][3] * it.step;
        }
    if (g == 0) {
        float* own = sums + warps * kRows * v.rank + 2 * (warp * kRows + 2 * t);
        own[0] = softmax.largest[0], own[1] = softmax.sum[0], own[2] = softmax.largest[1], own[3] = softmax.sum[1];
    }
    sync_block();
    const auto* exact = reinterpret_cast<const float*>(shared + args.exact_sum_at);
    merge_warps(args, rows, sums, OUTLIERS && v.outliers ? exact : nullptr, output, lse);
}

}  // namespace kvcompress::cuda
