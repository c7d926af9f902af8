// The instructions the kernels use. nvcc makes them PTX; for tests, csrc/emulator/emulate.h stands in for them, and runs
// the kernels' own source, warp by warp, on a machine without a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KVC_DEVICE __device__ __forceinline__
#define KVC_BOTH __host__ __device__ constexpr
// At least so many blocks per multiprocessor.
#define KVC_KERNEL_OF(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
// Two blocks per multiprocessor at least.
#define KVC_KERNEL(threads) static __global__ void __launch_bounds__(threads, 2)
// One block is enough: it fills the registers.
#define KVC_LONE_KERNEL(threads) static __global__ void __launch_bounds__(threads, 1)
#define KVC_ARGUMENT(type) const __grid_constant__ type
#define KVC_UNROLL _Pragma("unroll")
#define KVC_ROLLED _Pragma("unroll 1")  // rarely run: not worth its room in the instruction cache

namespace kvcompress::cuda {

KVC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
KVC_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
KVC_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
KVC_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
KVC_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
KVC_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

// Dynamic shared memory, the only kind in use.
KVC_DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t memory[];
    return memory;
}

KVC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

KVC_DEVICE void sync_block() { __syncthreads(); }
KVC_DEVICE void sync_warp() { __syncwarp(); }
KVC_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
KVC_DEVICE int shuffle_xor(int x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
KVC_DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }

// (a & mask) | bits in one instruction.
template <uint32_t MASK, uint32_t BITS>
KVC_DEVICE uint32_t mask_or(uint32_t a) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "n"(MASK), "n"(BITS));
    return result;
}

// Four of the eight bytes of b:a, chosen by the selector's hexadecimal digits, lowest first.
template <uint32_t SELECTOR>
KVC_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, SELECTOR);
}

KVC_DEVICE float half_to_float(uint16_t half) { return __half2float(__ushort_as_half(half)); }
KVC_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

// The first in the low half.
KVC_DEVICE uint32_t halves_of(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

// a * b + c of both halves, rounded once.
KVC_DEVICE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// Both halves of a times those of b.
KVC_DEVICE uint32_t halves_times(uint32_t a, uint32_t b) {
    const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(product);
}

KVC_DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KVC_DEVICE float log2_of(float x) { return __log2f(x); }
// Of angles within a turn: off by 2^-21 at most.
KVC_DEVICE float sin_of(float x) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KVC_DEVICE float cos_of(float x) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c += a b: a 16 x 16 (rows x depth), b 16 x 8 (depth x columns), float32 sums. With lane = 4 g + t:
//   a[i]  half e: row g + 8 (i % 2), depth 2 t + e + 8 (i / 2)
//   b[i]  half e: depth 2 t + e + 8 i, column g
//   c[i]          row g + 8 (i / 2), column 2 t + i % 2
KVC_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

// halves_of and mma in bfloat16.
KVC_DEVICE uint32_t bfloats_of(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
KVC_DEVICE void mma_bfloat16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8 i + j knows where row j of matrix i begins, on 16
// bytes; lane 4 g + t gets entries 2 t and 2 t + 1 of row g of every matrix, or of column g if they are transposed.
template <bool TRANSPOSED>
KVC_DEVICE void load_matrices(uint32_t (&matrix)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// An 8 x 8 matrix of halves, lane 4 g + t holding row g, columns 2 t and 2 t + 1: its transpose.
KVC_DEVICE uint32_t transpose(uint32_t a) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(a));
    return result;
}

KVC_DEVICE void add_shared(float* p, float x) { atomicAdd(p, x); }
KVC_DEVICE void flip_bits(uint32_t* p, uint32_t bits) { atomicXor(p, bits); }

// Copies by lanes (sm_80): each copies 16 bytes at a time, in groups that complete in order.
KVC_DEVICE void copy_16_bytes(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
KVC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
KVC_DEVICE void wait_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Copies by the copy engine (sm_90): one lane asks for bytes, all wait at the barrier.
#if __CUDA_ARCH__ >= 900
KVC_DEVICE void init_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
KVC_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// A barrier's phase ends when one lane has said how many bytes to expect and that many have come, in either order.
KVC_DEVICE void expect_bytes(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
KVC_DEVICE void copy_bulk_of(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
KVC_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    expect_bytes(barrier, bytes);
    copy_bulk_of(shared, global, bytes, barrier);
}
KVC_DEVICE void wait_barrier(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
#endif

struct Grid {
    int x, y, z;
};

template <auto KERNEL, typename Args>
int launch(Grid grid, int threads, int64_t shared_bytes, void* stream, const Args& args) {
    const auto bytes = static_cast<int>(shared_bytes);
    cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    KERNEL<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(
        args);
    return cudaGetLastError();
}

// Shared memory a block of the current device can have; returns an error's number.
inline int shared_limit(int64_t& limit) {
    int device = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    limit = bytes;
    return error;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kvcompress::cuda

// Whether the copy engine is used: known at compile time of each architecture.
#define KVC_BULK_COPIES (__CUDA_ARCH__ >= 900)

#elif !defined(KVC_DEVICE)
#error "the CUDA kernels are compiled by nvcc, or after csrc/emulator/emulate.h"
#endif
