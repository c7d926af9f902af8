// The stored tokens' part of an output: a softmax of scores, and with it the mean of values' latents, which torch
// expands. Scores of all heads mix a token's latent at once.
//
// A block takes one stripe, up to 32 rows (query heads, query token by query token) and a split of the tokens, 64 at a
// time: its warps make weights of 16 tokens each, then mix channels of their own. Codes are halves without a scale, the
// first operand [channels x tokens]; gains go into the weights, steps to the sums.
#pragma once

#include "cuda/shared/records.h"

namespace kvcompress::cuda {

constexpr int kMixTokens = 64, kMixWarps = 4, kMixRows = 32, kMixTiles = 4;  // tiles of a warp
constexpr int kRowTiles = kMixRows / kRows;

// Tokens that a request sees as they are: rows of the step, from its stored_lens on, but for those with a row below 0.
struct StepRows {
    const int32_t* stored_lens;
    const int32_t* exact_rows;
    const int32_t* exact_starts;

    KVC_DEVICE int row_of(int request, int token) const {
        return exact_rows[exact_starts[request] + token - stored_lens[request]];
    }
};

struct MixArgs {
    Record record;
    Stripe stripes[kMaxStripes];
    StepRows step;
    const float* scores;  // [requests, max_queries, heads, score_stride], in the exponent of 2
    int64_t score_stride;
    float* output;  // [splits, tokens, heads, stripes * rank]
    float* lse;  // [splits, tokens, heads]
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int first_request, max_queries, num_heads, num_stripes;
    int channel_blocks;  // of a stripe
    int64_t rows;  // tokens * heads
    int code_places;  // two, or one where shared memory has no room
    int codes_at, weights_at, kept_at, rows_at;
};

KVC_KERNEL(32 * kMixWarps) mix_shared(KVC_ARGUMENT(MixArgs) args) {
    uint8_t* shared = shared_memory();
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int g = lane / 4, t = lane % 4;
    const Record& record = args.record;
    const int request = args.first_request + block_z();
    const int stripe = block_y() / args.channel_blocks % args.num_stripes,
              channel_block = block_y() % args.channel_blocks;
    const int first_row = block_y() / (args.channel_blocks * args.num_stripes) * kMixRows;
    const int first_token = args.query_starts[request], queries = args.query_starts[request + 1] - first_token;
    int count = queries * args.num_heads - first_row;
    if (count <= 0) return;
    if (count > kMixRows) count = kMixRows;
    const int before = args.seq_lens[request] - queries + 1;  // tokens that the first query token sees
    const auto visible = [&](int row) { return before + (first_row + row) / args.num_heads; };
    const int limit = visible(count - 1);
    const int tiles = (limit + kMixTokens - 1) / kMixTokens, share = (tiles + grid_x() - 1) / grid_x();
    const int begin = block_x() * share, end = begin + share < tiles ? begin + share : tiles;
    const int64_t number = static_cast<int64_t>(first_token) * args.num_heads + first_row;
    float* lse = args.lse + block_x() * args.rows + number;
    const bool says_lse = stripe == 0 && channel_block == 0;
    if (begin >= end) {
        if (says_lse && thread_index() < count) lse[thread_index()] = -INFINITY;
        return;
    }
    const float* scores =
        args.scores +
        (static_cast<int64_t>(block_z()) * args.max_queries * args.num_heads + first_row) * args.score_stride;
    const int stored = args.step.stored_lens[request];
    const auto kept = [&](int token) {
        return token < limit && (token < stored || args.step.row_of(request, token) < 0);
    };

    const int run_bytes = kRun * record.token_bytes;
    const auto codes_of = [&](int tile) {
        return shared + args.codes_at + (tile - begin) % args.code_places * kMixWarps * run_bytes;
    };
    // Each warp one run.
    const auto request_codes = [&](int tile) {
        const int token = tile * kMixTokens + warp * kRun;
        if (tile < end && token < limit) {
            const uint8_t* from = run_at(record, args.stripes[stripe], request, 0, token);
            copy_run(record, from, codes_of(tile) + warp * run_bytes, lane, 32);
        }
        commit_copies();
    };
    request_codes(begin);

    // The largest score of each row. Scores lie in whole tiles, so reading beyond a row's last is safe.
    auto* tops = reinterpret_cast<float*>(shared + args.rows_at);
    float largest[kMixRows / kMixWarps];
    KVC_UNROLL
    for (float& top : largest) top = kLowest;
    for (int token = begin * kMixTokens + 4 * lane; token < end * kMixTokens; token += 128) {
        bool keep[4];
        KVC_UNROLL
        for (int e = 0; e < 4; ++e) keep[e] = kept(token + e);
        KVC_UNROLL
        for (int i = 0; i < kMixRows / kMixWarps; ++i) {
            const int row = warp + kMixWarps * i;
            if (row >= count) continue;
            const uint4 w = *reinterpret_cast<const uint4*>(scores + row * args.score_stride + token);
            const uint32_t bits[4] = {w.x, w.y, w.z, w.w};
            const int seen = visible(row);
            KVC_UNROLL
            for (int e = 0; e < 4; ++e) {
                union {
                    uint32_t bits;
                    float number;
                } score{bits[e]};
                if (keep[e] && token + e < seen) largest[i] = fmaxf(largest[i], score.number);
            }
        }
    }
    KVC_UNROLL
    for (int i = 0; i < kMixRows / kMixWarps; ++i) {
        KVC_UNROLL
        for (int lanes = 16; lanes; lanes /= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], lanes));
        if (lane == 0) tops[warp + kMixWarps * i] = largest[i];
    }
    sync_block();  // tops are there

    // This lane's rows g, g + 8, ... in weights; its tokens are 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the warp's run.
    float top[kRowTiles], sum[kRowTiles];
    int seen[kRowTiles];
    KVC_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
        const int row = kRows * n + g;
        top[n] = tops[row], sum[n] = 0, seen[n] = row < count ? visible(row) : 0;
    }
    float2 score[kRowTiles][2];
    const auto load_scores = [&](int tile) {
        const int token = tile * kMixTokens + warp * kRun + 2 * t;
        KVC_UNROLL
        for (int n = 0; n < kRowTiles; ++n)
            if (tile < end && seen[n]) KVC_UNROLL
        for (int i = 0; i < 2; ++i)
            score[n][i] =
                *reinterpret_cast<const float2*>(scores + (kRows * n + g) * args.score_stride + token + 8 * i);
    };
    load_scores(begin);
    auto* weights = reinterpret_cast<uint2*>(shared + args.weights_at);  // [row tiles][runs][lanes]
    auto* is_kept = shared + args.kept_at;  // [tokens]
    float o[kMixTiles][kRowTiles][4];
    KVC_UNROLL
    for (int i = 0; i < kMixTiles; ++i) KVC_UNROLL
    for (int n = 0; n < kRowTiles; ++n) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0;
    const int first_tile = channel_block * kMixTiles * kMixWarps + warp;

    for (int tile = begin; tile < end; ++tile) {
        wait_copies_but<0>();
        sync_block();  // all codes are there; nobody reads the other place, weights or marks of the last tile any more
        if (args.code_places > 1) request_codes(tile + 1);
        const uint8_t* codes = codes_of(tile);
        {
            const uint8_t* tokens = codes + warp * run_bytes;
            uint32_t b[kRowTiles][2];
            KVC_UNROLL
            for (int i = 0; i < 2; ++i) {
                float weight[kRowTiles][2];
                KVC_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const int within = 2 * t + e + 8 * i, token = tile * kMixTokens + warp * kRun + within;
                    const bool keep = kept(token);
                    // What is not kept may be anything, NaN included.
                    const float gain =
                        keep && record.gain_offset >= 0 ? gain_of(record, tokens + within * record.token_bytes) : 1;
                    if (g == 0) is_kept[warp * kRun + within] = keep;
                    KVC_UNROLL
                    for (int n = 0; n < kRowTiles; ++n) {
                        const float p =
                            keep && token < seen[n] ? exp2_of((e ? score[n][i].y : score[n][i].x) - top[n]) : 0;
                        sum[n] += p;
                        weight[n][e] = p * gain;
                    }
                }
                KVC_UNROLL
                for (int n = 0; n < kRowTiles; ++n) b[n][i] = halves_of(weight[n][0], weight[n][1]);
            }
            KVC_UNROLL
            for (int n = 0; n < kRowTiles; ++n) weights[(n * kMixWarps + warp) * 32 + lane] = {b[n][0], b[n][1]};
        }
        load_scores(tile + 1);
        sync_block();  // all weights and marks are there
        KVC_ROLLED
        for (int run = 0; run < kMixWarps; ++run) {
            const uint8_t* tokens = codes + run * run_bytes + g * record.token_bytes;
            uint32_t b[kRowTiles][2];
            KVC_UNROLL
            for (int n = 0; n < kRowTiles; ++n) {
                const uint2 w = weights[(n * kMixWarps + run) * 32 + lane];
                b[n][0] = w.x, b[n][1] = w.y;
            }
            const bool keep[2] = {is_kept[run * kRun + g] != 0, is_kept[run * kRun + g + 8] != 0};
            KVC_UNROLL
            for (int i = 0; i < kMixTiles; ++i) {
                if (first_tile + i * kMixWarps >= record.num_tiles) break;
                const Tile& it = record.tiles[first_tile + i * kMixWarps];
                uint32_t a[4];
                with_bits<0>(it.bits, [&](auto bits) {
                    KVC_UNROLL
                    for (int r = 0; r < 2; ++r) {
                        uint32_t pair[2];
                        unpack_four<bits.value>(tokens + r * 8 * record.token_bytes, it, t, pair);
                        KVC_UNROLL
                        for (int half = 0; half < 2; ++half) {
                            // 16-bit channels that are not kept may be NaN; codes never are.
                            const uint32_t x = bits.value == 16
                                                   ? (keep[r] ? pair[half] : 0)
                                                   : fma_halves(pair[half], halves_of(1, 1), halves_of(0.5f, 0.5f));
                            a[2 * r + half] = transpose(x);
                        }
                    }
                });
                KVC_UNROLL
                for (int n = 0; n < kRowTiles; ++n)
                    if (kRows * n < count) mma(o[i][n], a[0], a[1], a[2], a[3], b[n]);
            }
        }
        if (args.code_places == 1) {
            sync_block();  // nobody reads these codes any more
            request_codes(tile + 1);
        }
    }

    sync_block();  // sums go where weights were
    auto* sums = reinterpret_cast<float*>(shared + args.weights_at);  // [warps][rows]
    KVC_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
        sum[n] += shuffle_xor(sum[n], 1);
        sum[n] += shuffle_xor(sum[n], 2);
        if (t == 0) sums[warp * kMixRows + kRows * n + g] = sum[n];
    }
    sync_block();  // all sums are there
    const auto total_of = [&](int row) {
        float total = 0;
        for (int w = 0; w < kMixWarps; ++w) total += sums[w * kMixRows + row];
        return total;
    };
    if (says_lse && thread_index() < count) {
        const float total = total_of(thread_index());
        lse[thread_index()] = total == 0 ? -INFINITY : (tops[thread_index()] + log2_of(total)) * kLn2;
    }
    const int width = args.num_stripes * record.rank;
    float* output = args.output + (block_x() * args.rows + number) * width + stripe * record.rank;
    KVC_UNROLL
    for (int n = 0; n < kRowTiles; ++n) KVC_UNROLL
    for (int e = 0; e < 2; ++e) {
        const int row = kRows * n + 2 * t + e;
        if (row >= count) continue;
        const float total = total_of(row), inverse = total == 0 ? 0 : 1 / total;
        KVC_UNROLL
        for (int i = 0; i < kMixTiles; ++i) {
            if (first_tile + i * kMixWarps >= record.num_tiles) break;
            const Tile& it = record.tiles[first_tile + i * kMixWarps];
            KVC_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int channel = channel_of(g + 8 * half);
                if (channel < kGroup * it.units)
                    output[static_cast<int64_t>(row) * width + it.channel + channel] =
                        o[i][n][2 * half + e] * it.step * inverse;
            }
        }
    }
}

}  // namespace kvcompress::cuda
