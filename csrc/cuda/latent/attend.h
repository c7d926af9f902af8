// Attention of a few query rows on MLA latents: a token's vector is the key of all heads, its start their value.
//
// A block takes ROWS rows (heads of one or more query tokens) and one split of a request's tokens, and goes through them
// by tiles, each read into shared memory once and used twice. Products are rows x tokens, so that both need the tile as
// the second operand: as it lies for scores, transposed on its way to the registers for values. Of a tile,
//
//   scores    are sums over channels, too long for one warp: a warp adds up every kParts-th step of 16 channels for 16
//             tokens, with its own share of the query in registers, and leaves a partial score;
//   softmax   adds up the partial scores; each row is a few lanes' and keeps its largest score and its sum there;
//   values    have many channels: a warp has up to four times 16 of them, for all rows, in registers.
//
// Scores of the next tile follow values of this one without the block having met, so that tensor cores are kept busy. A
// tile is met about twice: when partial scores are complete, and when weights are.
//
// WIDE is for more channels than the narrow kernel has registers and room for: queries lie in shared memory, and the
// output is cut into slices of 512 channels, each a block's own.
#pragma once

#include "cuda/latent/numbers.h"
#include "cuda/latent/output.h"
#include "cuda/latent/queries.h"
#include "cuda/latent/tiles.h"

namespace kvcompress::cuda {

constexpr float kNoScore = -1e30f;  // below every score; unlike infinity it can be subtracted from itself

template <int ROWS, int TOKENS>
struct LatentShape {
    static constexpr int kParts = kLatentWarps / (TOKENS / 16);  // of channels
    static constexpr int kScorePitch = TOKENS + 8;  // floats from row to row: four rows lie in different banks
    static constexpr int kWeightPitch = 2 * TOKENS + 16;  // bytes from row to row: eight rows do
    static constexpr int kRowLanes = TOKENS / 4;  // that share a row's softmax
    static_assert(ROWS * kRowLanes <= kLatentThreads && ROWS * kRowLanes % 32 == 0);
};

constexpr int kNarrowChannels = 16 * kLatentSteps * LatentShape<32, 32>::kParts;

template <bool BF16, int ROWS, int TOKENS, bool WIDE>
KVC_KERNEL_OF(kLatentThreads, ROWS == 16 ? 2 : 1)
latent_attend(KVC_ARGUMENT(LatentArgs) args) {
    using Shape = LatentShape<ROWS, TOKENS>;
    constexpr int kTiles = ROWS / 16, kDepths = TOKENS / 16, kUnits = kSliceChannels / 16 / kLatentWarps;
    uint8_t* shared = shared_memory();
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int slice = WIDE ? block_x() % args.slices : 0;
    const int request = block_z();
    const LatentRows rows = LatentRows::of<ROWS>(args, request, WIDE ? block_x() / args.slices : block_x());
    if (rows.count <= 0) return;
    const int visible_end = rows.visible(args, rows.count - 1);
    const int tiles = (visible_end + TOKENS - 1) / TOKENS;
    int share = (tiles + args.splits - 1) / args.splits;
    if (share < kLeastTiles) share = kLeastTiles;
    const int begin = block_y() * share, end = begin + share < tiles ? begin + share : tiles;
    if (begin >= end) {
        write_no_latents<ROWS>(args, rows, slice);
        return;
    }

    auto* decays = reinterpret_cast<float*>(shared + args.state_at);  // [rows]
    auto* state = reinterpret_cast<float2*>(decays + ROWS);  // [rows]: largest score, sum
    uint8_t* weights = shared + args.weight_at;  // 16-bit [rows][tokens]
    auto* scores = reinterpret_cast<float*>(shared + args.score_at);  // [parts][rows][tokens]
    const int token_pitch = args.token_bytes + kTokenPadding, steps = args.token_bytes / 32;

    Tiles<TOKENS> ring(args, args.table + request * args.table_stride, shared + args.tile_at,
                       reinterpret_cast<uint64_t*>(shared), begin,
                       visible_end < end * TOKENS ? visible_end : end * TOKENS);
    sync_block();  // barriers are there
    for (int i = 1; i < args.stages; ++i) ring.request();

    const int part = warp % Shape::kParts, first_score_token = warp / Shape::kParts * 16;
    [[maybe_unused]] uint32_t query[WIDE ? 1 : kTiles][kLatentSteps][4];
    if constexpr (WIDE)
        stage_queries<ROWS>(args, rows, shared + args.query_at);
    else
        load_queries(args, rows, part, Shape::kParts, query);

    // A softmax row and four tokens of it.
    const int own_row = thread / Shape::kRowLanes, own_token = thread % Shape::kRowLanes * 4;
    const int own_visible = own_row < rows.count ? rows.visible(args, own_row) : 0;
    float largest = kNoScore, sum = 0;
    float o[kTiles][2 * kUnits][4];
    KVC_UNROLL
    for (int m = 0; m < kTiles; ++m) KVC_UNROLL
    for (int n = 0; n < 2 * kUnits; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;

    ring.settle();
    sync_block();  // the first tile is there, and zeros of all, and queries
    for (int tile = begin; tile < end; ++tile) {
        const uint8_t* latents = ring.wait();

        // Partial scores: rows 16 m + g and + 8, tokens 8 n + 2 t and the next, of the warp's 16.
        float s[kTiles][2][4];
        KVC_UNROLL
        for (int m = 0; m < kTiles; ++m) KVC_UNROLL
        for (int n = 0; n < 2; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
        const uint8_t* key = latents + (first_score_token + lane / 16 * 8 + lane % 8) * token_pitch + lane / 8 % 2 * 16;
        if constexpr (WIDE) {
            const uint8_t* rows_at = shared + args.query_at + lane % 16 * token_pitch + lane / 16 * 16;
            for (int step = part; step < steps; step += Shape::kParts) {
                uint32_t a[4], b[4];
                load_matrices<false>(a, rows_at + 32 * step);
                load_matrices<false>(b, key + 32 * step);
                multiply_add<BF16>(s[0][0], a, b[0], b[1]);
                multiply_add<BF16>(s[0][1], a, b[2], b[3]);
            }
        } else {
            // Keys of the next step are on their way while those of this one are multiplied; of two blocks on a
            // multiprocessor, which have no registers for that, one is while another's are.
            constexpr int kAhead = ROWS == 16 ? 0 : 1;
            uint32_t b[kAhead + 1][4];
            if (kAhead && part < steps) load_matrices<false>(b[0], key + 32 * part);
            KVC_UNROLL
            for (int n = 0; n < kLatentSteps; ++n) {
                const int later = n + kAhead, step = part + n * Shape::kParts;
                if (later < kLatentSteps && part + later * Shape::kParts < steps)
                    load_matrices<false>(b[later % (kAhead + 1)], key + 32 * (part + later * Shape::kParts));
                if (step >= steps) continue;
                const uint32_t (&now)[4] = b[n % (kAhead + 1)];
                KVC_UNROLL
                for (int m = 0; m < kTiles; ++m) {
                    multiply_add<BF16>(s[m][0], query[m][n], now[0], now[1]);
                    multiply_add<BF16>(s[m][1], query[m][n], now[2], now[3]);
                }
            }
        }
        KVC_UNROLL
        for (int m = 0; m < kTiles; ++m) KVC_UNROLL
        for (int n = 0; n < 2; ++n) {
            float* to = scores + (part * ROWS + 16 * m + g) * Shape::kScorePitch + first_score_token + 8 * n + 2 * t;
            *reinterpret_cast<float2*>(to) = {s[m][n][0], s[m][n][1]};
            *reinterpret_cast<float2*>(to + 8 * Shape::kScorePitch) = {s[m][n][2], s[m][n][3]};
        }
        sync_block();  // partial scores are there; the tile before has been read, and its weights
        ring.request();

        if (own_row < ROWS) {
            float x[4] = {0, 0, 0, 0};
            KVC_UNROLL
            for (int i = 0; i < Shape::kParts; ++i) {
                const float4 y =
                    *reinterpret_cast<const float4*>(scores + (i * ROWS + own_row) * Shape::kScorePitch + own_token);
                x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
            }
            float top = largest;
            KVC_UNROLL
            for (int i = 0; i < 4; ++i) {
                x[i] = TOKENS * tile + own_token + i < own_visible ? x[i] * args.factor : -INFINITY;
                top = fmaxf(top, x[i]);
            }
            KVC_UNROLL
            for (int lanes = 1; lanes < Shape::kRowLanes; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
            const float decay = exp2_of(largest - top);
            largest = top;
            const uint2 pairs = {pair_of<BF16>(exp2_of(x[0] - top), exp2_of(x[1] - top)),
                                 pair_of<BF16>(exp2_of(x[2] - top), exp2_of(x[3] - top))};
            // The sum is of weights as the tensor cores see them: they then add up to one exactly.
            sum = sum * decay + ((number_of<BF16>(pairs.x, 0) + number_of<BF16>(pairs.x, 1)) +
                                 (number_of<BF16>(pairs.y, 0) + number_of<BF16>(pairs.y, 1)));
            *reinterpret_cast<uint2*>(weights + own_row * Shape::kWeightPitch + 2 * own_token) = pairs;
            if (own_token == 0) decays[own_row] = decay;
        }
        ring.settle();
        sync_block();  // weights and decays are there, and the next tile; partial scores have been read

        bool changes = false;
        float decay[kTiles][2];
        KVC_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
            decay[i / 2][i % 2] = decays[8 * i + g];
            changes |= decay[i / 2][i % 2] != 1;
        }
        if (any_lane(changes)) KVC_UNROLL
        for (int m = 0; m < kTiles; ++m) KVC_UNROLL
        for (int n = 0; n < 2 * kUnits; ++n) {
            o[m][n][0] *= decay[m][0], o[m][n][1] *= decay[m][0];
            o[m][n][2] *= decay[m][1], o[m][n][3] *= decay[m][1];
        }
        uint32_t p[kTiles][kDepths][4];
        KVC_UNROLL
        for (int m = 0; m < kTiles; ++m) KVC_UNROLL
        for (int k = 0; k < kDepths; ++k)
            load_matrices<false>(p[m][k],
                                 weights + (16 * m + lane % 16) * Shape::kWeightPitch + 32 * k + lane / 16 * 16);
        const uint8_t* value = latents + lane % 16 * token_pitch + lane / 16 * 16;
        KVC_UNROLL
        for (int n = 0; n < kUnits; ++n) {
            const int unit = kSliceChannels / 16 * slice + kLatentWarps * n + warp;
            if (16 * unit >= args.rank) continue;
            KVC_UNROLL
            for (int k = 0; k < kDepths; ++k) {
                uint32_t b[4];
                load_matrices<true>(b, value + 16 * k * token_pitch + 32 * unit);
                KVC_UNROLL
                for (int m = 0; m < kTiles; ++m) {
                    multiply_add<BF16>(o[m][2 * n], p[m][k], b[0], b[1]);
                    multiply_add<BF16>(o[m][2 * n + 1], p[m][k], b[2], b[3]);
                }
            }
        }
    }

    KVC_UNROLL
    for (int lanes = 1; lanes < Shape::kRowLanes; lanes *= 2) sum += shuffle_xor(sum, lanes);
    if (own_row < ROWS && own_token == 0) state[own_row] = {largest, sum};
    sync_block();  // every row's end is known
    write_latents<BF16, kTiles, kUnits>(args, rows, slice, state, o);
}

}  // namespace kvcompress::cuda
