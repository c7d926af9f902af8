// Parts of a block's record that stand beside its codes: scales and zeros, the low-rank residual's factors, outliers.
#pragma once

#include "cpu/core/outliers.h"
#include "cpu/core/vec.h"

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

// Channels with room for whole vectors of every level.
KVC_INLINE int padded_rank(const kvc_blocks_side& side) { return round_up(side.rank, 16); }

// `width` channels of a side's codes as one band of the scalar form, whose unpacking is the same.
KVC_INLINE kvc_side band_of(const kvc_blocks_side& side, int width) {
    kvc_side band{};
    band.rank = band.widths[0] = width;
    band.num_bands = 1;
    band.bits[0] = side.bits;
    band.steps[0] = 1;
    band.code_bytes = side.rank * side.bits / 8;
    return band;
}

// `bytes` of a vector's, the rest zeros. The size is a constant where it can be: compilers turn others into a call.
template <typename Vector>
KVC_INLINE Vector load_some(const uint8_t* p, int bytes) {
    Vector v = {};
    if (bytes >= static_cast<int>(sizeof v))
        std::memcpy(&v, p, sizeof v);
    else
        std::memcpy(&v, p, static_cast<size_t>(bytes));
    return v;
}

// Halves [rows][columns] to floats out[column][row], `stride` apart, with zeros up to the next whole vector of rows.
inline void read_halves(const uint8_t* halves, int rows, int columns, float* out, int stride) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    for (int row = 0; row < rows; row += kLanes, halves += 2 * kLanes * columns, out += kLanes) {
        const int count = min_of(rows - row, kLanes);
        if (columns == 1) {
            store(out, half_to_float(__builtin_convertvector(load_some<Halves>(halves, 2 * count), VecU)));
        } else if (columns == 2) {
            const VecU pairs = load_some<VecU>(halves, 4 * count);
            store(out, half_to_float(pairs & 0xffffu));
            store(out + stride, half_to_float(pairs >> 16));
        } else {
            for (int column = 0; column < columns; ++column) {
                alignas(kAlign) uint32_t words[kLanes] = {};
                for (int lane = 0; lane < count; ++lane)
                    std::memcpy(words + lane, halves + 2 * (lane * columns + column), 2);
                store(out + column * stride, half_to_float(load(words)));
            }
        }
    }
}

// ---- outliers ------------------------------------------------------------------------------------------------------

// A block's outliers in order of their tokens. Tokens (within the block) and channels are counted in fours, the floats
// that four rows have side by side.
struct Sparse {
    int32_t* token;
    int32_t* channel;
    float* value;
    int next;  // the first that belongs to a later tile
};

inline void read_sparse(const kvc_blocks_side& side, int block, const uint8_t* record, Sparse& out) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    const float inverse = 1.f / static_cast<float>(side.rank);
    // A damaged page may name a place that is not there; it must not become a write elsewhere.
    const VecI last = VecI{} + (block * side.rank - 1);
    for (int i = 0; i < side.outliers; i += kLanes) {
        const int bytes = 2 * (side.outliers - i);
        const Halves value = load_some<Halves>(record + side.value_offset + 2 * i, bytes);
        VecI place = __builtin_convertvector(load_some<Halves>(record + side.place_offset + 2 * i, bytes), VecI);
        place = place < last ? place : last;
        // Exact: places are below 2^16, and half an entry is more than the product's error.
        const VecI token = __builtin_convertvector((__builtin_convertvector(place, VecF) + 0.5f) * inverse, VecI);
        const VecI tokens = token * 4, channels = (place - token * side.rank) * 4;
        std::memcpy(out.token + i, &tokens, sizeof tokens);
        std::memcpy(out.channel + i, &channels, sizeof channels);
        store(out.value + i, half_to_float(__builtin_convertvector(value, VecU)));
    }
    if (block > kTile)  // tiles are found by order, which a damaged page may lack
        for (int i = 1; i < side.outliers; ++i)
            if (out.token[i] < out.token[i - 1]) out.token[i] = out.token[i - 1];
    out.next = 0;
}

// The outliers [first, next) of the tile that begins at a token of the block; tiles are asked for in order.
KVC_INLINE int of_tile(Sparse& sparse, int count, int start) {
    const int first = sparse.next;
    while (sparse.next < count && sparse.token[sparse.next] < 4 * (start + kTile)) ++sparse.next;
    return first;
}

// score[row][token] += query[row][channel] * value; queries are [rows / 4][channels][4], rows padded to fours.
inline void score_sparse(const Sparse sparse, int first, int start, const float* queries, int rank, int rows,
                         float* scores) {
    for (int row = 0; row < rows; row += 4, queries += 4 * rank, scores += 4 * kTile) {
        // Neighbours often share their token; two sums let them overlap.
        alignas(kAlign) float sums[2][4 * kTile] = {};
        const int32_t *token = sparse.token, *channel = sparse.channel;
        const float* value = sparse.value;
        const auto add = [=](int i, float* side) KVC_LAMBDA {
            float* target = side + token[i] - 4 * start;
            store4(target, load4(target) + load4(queries + channel[i]) * value[i]);
        };
        int i = first;
        for (; i + 2 <= sparse.next; i += 2) {
            add(i, sums[0]);
            add(i + 1, sums[1]);
        }
        if (i < sparse.next) add(i, sums[0]);
        for (int t = 0; t < kTile; t += 4) {
            Vec4 four[4];
            repeat<4>([&](auto n)
                          KVC_LAMBDA { four[n] = load4(sums[0] + 4 * (t + n)) + load4(sums[1] + 4 * (t + n)); });
            transpose4(four);
            repeat<4>([&](auto r) KVC_LAMBDA {
                float* target = scores + r * kTile + t;
                store4(target, load4(target) + four[r]);
            });
        }
    }
}

// exact[row][channel] = exact * decay[row] + weight[row][token] * value; exact is [rows / 4][channels][4].
inline void mix_sparse(const Sparse sparse, int first, int start, const float* weights, const float* decay, int rank,
                       int rows, float* exact) {
    for (int row = 0; row < rows; row += 4, exact += 4 * rank, weights += 4 * kTile, decay += 4) {
        const Vec4 factor = load4(decay);
        if (factor[0] != 1 || factor[1] != 1 || factor[2] != 1 || factor[3] != 1)
            for (int c = 0; c < rank; ++c) store4(exact + 4 * c, load4(exact + 4 * c) * factor);
        alignas(kAlign) float turned[4 * kTile];
        for (int t = 0; t < kTile; t += 4) {
            Vec4 weight[4];
            repeat<4>([&](auto r) KVC_LAMBDA { weight[r] = load4(weights + r * kTile + t); });
            transpose4(weight);
            repeat<4>([&](auto n) KVC_LAMBDA { store4(turned + 4 * (t + n), weight[n]); });
        }
        const int32_t *token = sparse.token, *channel = sparse.channel;
        const float* value = sparse.value;
        for (int i = first; i < sparse.next; ++i) {
            float* target = exact + channel[i];
            store4(target, load4(target) + load4(turned + token[i] - 4 * start) * value[i]);
        }
    }
}

// ---- low-rank residual ---------------------------------------------------------------------------------------------

// The loops below take a compile-time number of factors at a time: one at a time, most of their work would be loading
// and storing what is summed up.
constexpr int kFactors = 4;
template <typename Body>
KVC_INLINE void by_factors(int low_rank, const Body& body) {
    int l = 0;
    for (; l + kFactors <= low_rank; l += kFactors) body(std::integral_constant<int, kFactors>{}, l);
    if (low_rank - l == 3) body(std::integral_constant<int, 3>{}, l);
    if (low_rank - l == 2) body(std::integral_constant<int, 2>{}, l);
    if (low_rank - l == 1) body(std::integral_constant<int, 1>{}, l);
}

// Weights of a row on the factors: out[l] = sum_i x[i] factors[l][i]; x has zeros past its end.
KVC_INLINE void project(const float* x, const float* factors, int stride, int count, int low_rank, float* out) {
    by_factors(low_rank, [&](auto n, int l) KVC_LAMBDA {
        VecF totals[n];
        repeat<n>([&](auto j) KVC_LAMBDA { totals[j] = VecF{}; });
        for (int i = 0; i < count; i += kLanes) {
            const VecF entry = load(x + i);
            repeat<n>([&](auto j) KVC_LAMBDA { totals[j] += entry * load(factors + (l + j) * stride + i); });
        }
        repeat<n>([&](auto j) KVC_LAMBDA { out[l + j] = sum(totals[j]); });
    });
}

// x[i] += sum_l weight[l] factors[l][i]
KVC_INLINE void expand(const float* weight, const float* factors, int stride, int count, int low_rank, float* x) {
    by_factors(low_rank, [&](auto n, int l) KVC_LAMBDA {
        for (int i = 0; i < count; i += kLanes) {
            VecF total = load(x + i);
            repeat<n>([&](auto j) KVC_LAMBDA { total += load(factors + (l + j) * stride + i) * weight[l + j]; });
            store(x + i, total);
        }
    });
}

// x[i] *= decay
KVC_INLINE void scale_row(float* x, int count, float decay) {
    if (decay == 1) return;
    for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) * decay);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
