// Vectors of the level's native width through the compiler's vector extension, and number formats.
#pragma once

#include "cpu/core/kernels.h"

#include <cstring>
#if KVC_LEVEL_NUMBER >= 1
#include <immintrin.h>
#endif
#include <utility>

#if KVC_LEVEL_NUMBER >= 2
#define KVC_LANES 16
#elif KVC_LEVEL_NUMBER == 1
#define KVC_LANES 8
#else
#define KVC_LANES 4
#endif

#define KVC_INLINE inline __attribute__((always_inline))
// Functions that keep their own frame: in one, the compiler runs out of registers for addresses.
#define KVC_NOINLINE inline __attribute__((noinline))

#define KVC_LAMBDA __attribute__((always_inline))

namespace kvcompress::cpu::KVC_LEVEL {
namespace {

constexpr int kLanes = KVC_LANES;
typedef float VecF __attribute__((vector_size(4 * KVC_LANES), may_alias));
typedef int32_t VecI __attribute__((vector_size(4 * KVC_LANES), may_alias));
typedef uint32_t VecU __attribute__((vector_size(4 * KVC_LANES), may_alias));

// Temporary arrays, one after the other.
struct Arena {
    char* base;
    size_t used = 0;
    template <typename T>
    T* take(size_t count) {
        T* start = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
        return start;
    }
};

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
KVC_INLINE int min_of(int a, int b) { return a < b ? a : b; }

// body(0), ..., body(N - 1) with compile-time indices. Accumulator arrays are indexed this way only: a loop that is
// unrolled later leaves them in memory.
template <typename Body, int... I>
KVC_INLINE void repeat(std::integer_sequence<int, I...>, const Body& body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, typename Body>
KVC_INLINE void repeat(const Body& body) {
    repeat(std::make_integer_sequence<int, N>{}, body);
}

KVC_INLINE VecF load(const float* p) {
    VecF v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
KVC_INLINE VecU load(const uint32_t* p) {
    VecU v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
KVC_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
KVC_INLINE VecF splat(float x) { return x - VecF{}; }
KVC_INLINE VecF max_of(VecF a, VecF b) { return a > b ? a : b; }
KVC_INLINE VecF min_of(VecF a, VecF b) { return a < b ? a : b; }
KVC_INLINE VecF bits_to_float(VecU v) { return reinterpret_cast<VecF&>(v); }
KVC_INLINE VecU float_to_bits(VecF v) { return reinterpret_cast<VecU&>(v); }

KVC_INLINE float sum(VecF v) {
#if KVC_LANES == 16
    return _mm512_reduce_add_ps(v);
#else
    float total[kLanes];
    store(total, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) total[i] += total[i + width];
    return total[0];
#endif
}

KVC_INLINE float max_lane(VecF v) {
#if KVC_LANES == 16
    return _mm512_reduce_max_ps(v);
#else
    float largest[kLanes];
    store(largest, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) largest[i] = largest[i] > largest[i + width] ? largest[i] : largest[i + width];
    return largest[0];
#endif
}

// e^x for x <= 0, exact zero below -87, relative error under 3e-7: x = n ln 2 + r and a degree-6 polynomial in r
// (the Taylor series; |r| <= ln(2)/2 leaves 1.2e-7).
KVC_INLINE VecF exp_nonpositive(VecF x) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const VecF clamped = max_of(x, splat(-87.f));
    const VecF shifted = clamped * 1.44269504f + kRound;
    const VecF n = shifted - kRound;
    VecF r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VecF y = splat(1.f / 720.f);
    y = y * r + 1.f / 120.f;
    y = y * r + 1.f / 24.f;
    y = y * r + 1.f / 6.f;
    y = y * r + 0.5f;
    y = y * r + 1.f;
    y = y * r + 1.f;
    const VecF power = bits_to_float((float_to_bits(shifted) + 127u) << 23);
    return x < splat(-87.f) ? VecF{} : y * power;
}

// IEEE halves in the low 16 bits of each lane; infinities and NaN become large finite numbers (a cache has none).
KVC_INLINE VecF half_to_float(VecU half) {
    const VecF magnitude = bits_to_float((half & 0x7fffu) << 13) * 0x1p112f;
    return bits_to_float(float_to_bits(magnitude) | ((half & 0x8000u) << 16));
}

#if KVC_LEVEL_NUMBER >= 2
KVC_INLINE VecF load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif KVC_LEVEL_NUMBER == 1
KVC_INLINE VecF load_halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

KVC_INLINE float half_to_float(uint16_t half) {
    const uint32_t low = (half & 0x7fffu) << 13;
    float magnitude;
    std::memcpy(&magnitude, &low, 4);
    magnitude *= 0x1p112f;
    if ((half & 0x7c00u) == 0x7c00u) magnitude = half & 0x3ffu ? __builtin_nanf("") : __builtin_inff();
    return half & 0x8000u ? -magnitude : magnitude;
}

KVC_INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
    if (bits < 0x38800000u) {  // below 2^-14: let the addition of 0.5 round at the half's subnormal step of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u) - 0x38000000u;
    return static_cast<uint16_t>(sign | bits >> 13);
}

KVC_INLINE uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

KVC_INLINE const void* row_at(const kvc_rows& rows, int64_t token, int64_t head) {
    const int64_t element = token * rows.token_stride + head * rows.head_stride;
    return static_cast<const char*>(rows.data) + element * (rows.dtype == KVC_FLOAT32 ? 4 : 2);
}

inline void load_row(const kvc_rows& rows, int64_t token, int64_t head, int width, float* out) {
    const void* source = row_at(rows, token, head);
    if (rows.dtype == KVC_FLOAT32) {
        std::memcpy(out, source, 4 * static_cast<size_t>(width));
        return;
    }
    const auto* halves = static_cast<const uint16_t*>(source);
    for (int i = 0; i < width; ++i) {
        if (rows.dtype == KVC_BFLOAT16) {
            const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
            std::memcpy(out + i, &bits, 4);
        } else {
            out[i] = half_to_float(halves[i]);
        }
    }
}

inline void store_row(const kvc_rows& rows, int64_t token, int64_t head, int width, const float* in) {
    void* target = const_cast<void*>(row_at(rows, token, head));
    if (rows.dtype == KVC_FLOAT32) {
        std::memcpy(target, in, 4 * static_cast<size_t>(width));
        return;
    }
    auto* halves = static_cast<uint16_t*>(target);
    for (int i = 0; i < width; ++i)
        halves[i] = rows.dtype == KVC_BFLOAT16 ? float_to_bfloat(in[i]) : float_to_half(in[i]);
}

// out[r][j] = sum_i x[r][i] matrix[i][j] for ROWS rows.
template <int ROWS>
inline void rows_times(const float* x, int x_stride, const float* matrix, int rows, int columns, float* out,
                       int out_stride) {
    constexpr int kVectors = 16 / kLanes;  // columns come in eights
    int j = 0;
    for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) {
        VecF sums[ROWS][kVectors];
        repeat<ROWS>([&](auto r) KVC_LAMBDA { repeat<kVectors>([&](auto n) KVC_LAMBDA { sums[r][n] = VecF{}; }); });
        for (int i = 0; i < rows; ++i) {
            const float* m = matrix + static_cast<int64_t>(i) * columns + j;
            repeat<kVectors>([&](auto n) KVC_LAMBDA {
                const VecF column = load(m + n * kLanes);
                repeat<ROWS>([&](auto r) KVC_LAMBDA { sums[r][n] += column * x[r * x_stride + i]; });
            });
        }
        repeat<ROWS>([&](auto r) KVC_LAMBDA {
            repeat<kVectors>([&](auto n) KVC_LAMBDA { store(out + r * out_stride + j + n * kLanes, sums[r][n]); });
        });
    }
    for (; j < columns; ++j)
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int i = 0; i < rows; ++i) sum += matrix[static_cast<int64_t>(i) * columns + j] * x[r * x_stride + i];
            out[r * out_stride + j] = sum;
        }
}

// Up to eight rows multiplied by a matrix.
constexpr int kMatrixRows = 8;
inline void rows_times_matrix(const float* x, int count, int x_stride, const float* matrix, int rows, int columns,
                              float* out, int out_stride) {
    int r = 0;
    for (; r + 4 <= count; r += 4)
        rows_times<4>(x + r * x_stride, x_stride, matrix, rows, columns, out + r * out_stride, out_stride);
    for (; r < count; ++r)
        rows_times<1>(x + r * x_stride, x_stride, matrix, rows, columns, out + r * out_stride, out_stride);
}

}  // namespace
}  // namespace kvcompress::cpu::KVC_LEVEL
