// Scores with keys that layers share: latents before RoPE, from which the layer expands keys of its own.
//
// A block takes one KV head, whose keys all its query rows have in common, and one split of a request's tokens, which
// its warps divide. A warp keeps its tokens' keys, sums of [tokens x channels of the latent] [channels x head_dim], in
// registers while channels go by: codes are read once per KV head and become halves times the gain; slices of the
// decoder come from the second-level cache into two places of shared memory by turns, or stay there if all have room.
// Then keys are rotated where they are (the two channels of a rotation are in one lane) and become the first operand
// of the product with the queries.
//
// A position's decoder is halved in precision, not more: a power of two per head keeps its largest entry at 2^8, gains
// are multiplied by a power of two that lets no latent exceed a half's range, keys by one per token.
#pragma once

#include "cuda/shared/keys.h"

namespace kvcompress::cuda {

constexpr int kScoreThreads = 256;
constexpr int kSliceTiles = 4;

struct SharedScoreArgs {
    ScoreArgs rows;
    const uint8_t* decode;  // halves [heads, stripes, tiles, pairs of column tiles, lanes, 8]
    const float* decode_unit;  // [heads]: what they are to be multiplied by
    const float* mean;  // [heads, WIDTH]
    const float* frequency;  // [WIDTH / 2]
    const float* amplitude;  // of the rotation
    int head_dim;
    int decode_slots;  // slices that shared memory has room for: two, or all
    int codes_at, mean_at, frequency_at, decode_at;
};

KVC_BOTH int slices_of(const Record& record) { return (record.num_tiles + kSliceTiles - 1) / kSliceTiles; }

// Tokens of a warp: their keys fill its registers.
template <int WIDTH>
KVC_BOTH int warp_tokens() {
    return WIDTH <= 128 ? 2 * kRun : kRun;
}

// What a block does between two barriers: one slice of one stripe, for all its tokens.
struct SliceStep {
    int tile, stripe = 0, slice = 0, number = 0, unit = 0;

    KVC_DEVICE SliceStep after(int slices, int stripes) const {
        SliceStep next = *this;
        ++next.number;
        if (++next.slice < slices) return next;
        next.slice = 0, ++next.unit;
        if (++next.stripe < stripes) return next;
        next.stripe = 0, ++next.tile;
        return next;
    }
};

// WIDTH channels hold head_dim of them: each half of a key fills the beginning of a half.
template <int WIDTH>
KVC_LONE_KERNEL(kScoreThreads)
score_shared(KVC_ARGUMENT(SharedScoreArgs) args) {
    constexpr int kRuns = warp_tokens<WIDTH>() / kRun, kColumns = WIDTH / 8, kTileBytes = 2 * kTileChannels * WIDTH;
    uint8_t* shared = shared_memory();
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = num_threads() / 32;
    const int g = lane / 4, t = lane % 4;
    const Record& record = args.rows.record;
    ScoreRows rows;
    if (!rows.find(args.rows)) return;
    const int block_tokens = kRuns * kRun * warps;
    const int tiles = (rows.limit + block_tokens - 1) / block_tokens, share = (tiles + grid_x() - 1) / grid_x();
    const int begin = block_x() * share, end = begin + share < tiles ? begin + share : tiles;
    if (begin >= end) return;

    const int slices = slices_of(record), stripes = args.rows.num_stripes;
    const bool resident = args.decode_slots >= slices * stripes;
    const int run_bytes = kRun * record.token_bytes;
    uint8_t* codes = shared + args.codes_at + warp * 2 * kRuns * run_bytes;  // two places of the warp's own
    const uint8_t* decode = args.decode + static_cast<int64_t>(rows.head) * stripes * record.num_tiles * kTileBytes;

    const auto slot_of = [&](const SliceStep& step) {
        const int slot = resident ? step.stripe * slices + step.slice : step.number % 2;
        return shared + args.decode_at + slot * kSliceTiles * kTileBytes;
    };
    const auto codes_of = [&](const SliceStep& step) { return codes + step.unit % 2 * kRuns * run_bytes; };
    const auto first_token_of = [&](const SliceStep& step) { return (step.tile * warps + warp) * kRuns * kRun; };
    const auto request = [&](const SliceStep& step) {
        if (step.tile < end) {
            if (!resident || step.tile == begin) {
                const int left = record.num_tiles - step.slice * kSliceTiles,
                          count = left < kSliceTiles ? left : kSliceTiles;
                const uint8_t* from =
                    decode +
                    (static_cast<int64_t>(step.stripe) * record.num_tiles + step.slice * kSliceTiles) * kTileBytes;
                uint8_t* to = slot_of(step);
                for (int at = 16 * thread_index(); at < count * kTileBytes; at += 16 * num_threads())
                    copy_16_bytes(to + at, from + at);
            }
            if (step.slice == 0) {
                KVC_UNROLL
                for (int run = 0; run < kRuns; ++run) {
                    const int token = first_token_of(step) + run * kRun;
                    if (token >= rows.limit) break;
                    const uint8_t* from = run_at(record, args.rows.stripes[step.stripe], rows.request, 0, token);
                    copy_run(record, from, codes_of(step) + run * run_bytes, lane, 32);
                }
            }
        }
        commit_copies();
    };

    SliceStep now{begin};
    request(now);
    auto* means = reinterpret_cast<float*>(shared + args.mean_at);
    auto* frequencies = reinterpret_cast<float*>(shared + args.frequency_at);
    for (int c = thread_index(); c < WIDTH; c += num_threads()) means[c] = args.mean[rows.head * WIDTH + c];
    for (int c = thread_index(); c < WIDTH / 2; c += num_threads()) frequencies[c] = args.frequency[c];
    prepare_queries(
        args.rows, rows, WIDTH, shared,
        [&](int row, int c) {
            const int within = c % (WIDTH / 2), half = args.head_dim / 2;
            if (within >= half) return 0.f;
            return load_entry(args.rows.query, rows.first_token + rows.token_of(args.rows, row),
                              rows.head_of(args.rows, row), c / (WIDTH / 2) * half + within);
        },
        [](int n) { return n; });
    // Half of 2^bits, the largest code's distance from zero, times the largest gain is less than a half's largest.
    const float down = record.gain_offset < 0 ? 1.f : power_of_two(1 - record.widest);
    const float unit = args.decode_unit[rows.head] / down;
    const float amplitude = *args.amplitude;
    float position = static_cast<float>(first_token_of(now) + g);

    float key[kRuns][kColumns][4] = {};
    uint32_t gain[kRuns][2], half_gain[kRuns][2];
    while (now.tile < end) {
        wait_copies_but<0>();
        // All have their copies of this step, and nobody reads what the next one's will overwrite: of a decoder that
        // stays, nothing is overwritten, and the codes are the warp's own.
        if (resident && now.tile > begin)
            sync_warp();
        else
            sync_block();
        const SliceStep next = now.after(slices, stripes);
        request(next);
        const int first = first_token_of(now);
        if (first < rows.limit) {
            const uint8_t* tokens = codes_of(now) + g * record.token_bytes;
            if (now.slice == 0 && record.gain_offset >= 0) {
                KVC_UNROLL
                for (int run = 0; run < kRuns; ++run) KVC_UNROLL
                for (int r = 0; r < 2; ++r) {
                    const float x = gain_of(record, tokens + run * run_bytes + r * 8 * record.token_bytes) * down;
                    gain[run][r] = halves_of(x, x), half_gain[run][r] = halves_of(x / 2, x / 2);
                }
            }
            const int first_tile = now.slice * kSliceTiles;
            const int last_tile =
                first_tile + kSliceTiles < record.num_tiles ? first_tile + kSliceTiles : record.num_tiles;
            const auto* factors = reinterpret_cast<const uint4*>(slot_of(now)) + lane;
            KVC_ROLLED
            for (int n = first_tile; n < last_tile; ++n, factors += kTileBytes / 16) {
                const Tile& tile = record.tiles[n];
                uint32_t a[kRuns][4];
                with_bits<0>(tile.bits, [&](auto bits) {
                    KVC_UNROLL
                    for (int run = 0; run < kRuns; ++run) KVC_UNROLL
                    for (int r = 0; r < 2; ++r) {
                        uint32_t pair[2];
                        unpack_four<bits.value>(tokens + run * run_bytes + r * 8 * record.token_bytes, tile, t, pair);
                        // Codes stand for numbers around zero, half a step off.
                        KVC_UNROLL
                        for (int i = 0; i < 2; ++i)
                            a[run][2 * i + r] =
                                bits.value == 16 ? pair[i] : fma_halves(pair[i], gain[run][r], half_gain[run][r]);
                    }
                });
                KVC_UNROLL
                for (int pair = 0; pair < kColumns / 2; ++pair) {
                    const uint4 w = factors[32 * pair];
                    const uint32_t b0[2] = {w.x, w.y}, b1[2] = {w.z, w.w};
                    KVC_UNROLL
                    for (int run = 0; run < kRuns; ++run) {
                        mma(key[run][2 * pair], a[run][0], a[run][1], a[run][2], a[run][3], b0);
                        mma(key[run][2 * pair + 1], a[run][0], a[run][1], a[run][2], a[run][3], b1);
                    }
                }
            }
        }
        if (next.tile != now.tile) {
            if (first < rows.limit) {
                KVC_UNROLL
                for (int run = 0; run < kRuns; ++run) {
                    const float beginning = position + static_cast<float>(run * kRun);
                    const float unit0 = finish_keys<0>(key[run], unit, means, frequencies, beginning, t) * amplitude;
                    const float unit1 =
                        finish_keys<1>(key[run], unit, means, frequencies, beginning + 8, t) * amplitude;
                    score_keys(args.rows, rows, key[run], first + run * kRun, unit0, unit1, shared);
                    KVC_UNROLL
                    for (int column = 0; column < kColumns; ++column)
                        key[run][column][0] = key[run][column][1] = key[run][column][2] = key[run][column][3] = 0;
                }
            }
            position += static_cast<float>(block_tokens);
        }
        now = next;
    }
}

}  // namespace kvcompress::cuda
