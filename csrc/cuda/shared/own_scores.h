// Scores with keys of the layer's own, whose queries are absorbed: products with codes as they are stored.
#pragma once

#include "cuda/shared/score_rows.h"

namespace kvcompress::cuda {

// `rows.query` is [tokens, heads, tiles * 16], steps multiplied in, zero where a tile has no channel.
struct OwnScoreArgs {
    ScoreArgs rows;
    int codes_at;
};

// A block per KV head and split; its warps go through runs independently, each with two places for them.
KVC_KERNEL(kMaxThreads) score_own(KVC_ARGUMENT(OwnScoreArgs) args) {
    uint8_t* shared = shared_memory();
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int g = lane / 4, t = lane % 4;
    const Record& record = args.rows.record;
    ScoreRows rows;
    if (!rows.find(args.rows)) return;
    const int runs = (rows.limit + kRun - 1) / kRun, share = (runs + grid_x() - 1) / grid_x();
    const int begin = block_x() * share, end = begin + share < runs ? begin + share : runs;
    if (begin >= end) return;

    uint8_t* codes = shared + args.codes_at + warp * 2 * kRun * record.token_bytes;
    const auto request = [&](int run, int place) {
        if (run < end) {
            const uint8_t* from = run_at(record, args.rows.stripes[0], rows.request, rows.head, run * kRun);
            copy_run(record, from, codes + place * kRun * record.token_bytes, lane, 32);
        }
        commit_copies();
    };
    request(begin + warp, 0);
    prepare_queries(
        args.rows, rows, kTileChannels * record.num_tiles, shared,
        [&](int row, int c) {
            return load_entry(args.rows.query, rows.first_token + rows.token_of(args.rows, row),
                              rows.head_of(args.rows, row), c);
        },
        [](int channel) { return 2 * (channel / 4) + 8 * (channel / 2 % 2) + channel % 2; });  // inverse of channel_of
    sync_block();

    const auto* queries = reinterpret_cast<const uint2*>(shared + args.rows.query_at) + lane;
    int place = 0;
    for (int run = begin + warp; run < end; run += warps, place ^= 1) {
        wait_copies_but<0>();
        sync_warp();  // all lanes' copies are there, and nobody reads the other place any more
        request(run + warps, place ^ 1);
        const uint8_t* tokens = codes + (place * kRun + g) * record.token_bytes;
        float s[kMostRowTiles][4];
        KVC_UNROLL
        for (int row_tile = 0; row_tile < kMostRowTiles; ++row_tile)
            s[row_tile][0] = s[row_tile][1] = s[row_tile][2] = s[row_tile][3] = 0;
        KVC_ROLLED
        for (int n = 0; n < record.num_tiles; ++n) {
            const Tile& tile = record.tiles[n];
            uint32_t a[4];
            with_bits<0>(tile.bits, [&](auto bits) {
                KVC_UNROLL
                for (int r = 0; r < 2; ++r) {
                    uint32_t pair[2];
                    unpack_four<bits.value>(tokens + r * 8 * record.token_bytes, tile, t, pair);
                    KVC_UNROLL
                    for (int i = 0; i < 2; ++i)
                        a[2 * i + r] =
                            bits.value == 16 ? pair[i] : fma_halves(pair[i], halves_of(1, 1), halves_of(0.5f, 0.5f));
                }
            });
            KVC_UNROLL
            for (int row_tile = 0; row_tile < kMostRowTiles; ++row_tile)
                if (kRows * row_tile < rows.count) {
                    const uint2 q = queries[32 * (row_tile * record.num_tiles + n)];
                    const uint32_t b[2] = {q.x, q.y};
                    mma(s[row_tile], a[0], a[1], a[2], a[3], b);
                }
        }
        const bool has_gain = record.gain_offset >= 0;
        const float gain0 = has_gain ? gain_of(record, tokens) : 1,
                    gain1 = has_gain ? gain_of(record, tokens + 8 * record.token_bytes) : 1;
        KVC_UNROLL
        for (int row_tile = 0; row_tile < kMostRowTiles; ++row_tile)
            if (kRows * row_tile < rows.count)
                write_scores(args.rows, rows, row_tile, run * kRun, gain0, gain1, s[row_tile], shared);
    }
}

}  // namespace kvcompress::cuda
