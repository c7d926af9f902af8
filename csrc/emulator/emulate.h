// A block of threads on one CPU thread: every CUDA thread is a fiber, and warp-wide instructions are where its lanes
// meet. For tests only; slow.
//
// What it is strict about: lanes that meet in different instructions, waits that can never end, copies read before they
// were waited for (they happen no earlier), what they overwrite read after they were asked for (it is NaN from then on),
// and shared memory read before it was written (it begins as NaN). Sums of tensor cores are rounded towards zero after
// every product, which is what the hardware is known to do at worst (Ootomo & Yokota, 2022, arXiv 2203.03341).
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#define KVC_DEVICE inline
#define KVC_BOTH constexpr
#define KVC_KERNEL_OF(threads, blocks) static void
#define KVC_KERNEL(threads) static void
#define KVC_LONE_KERNEL(threads) static void
#define KVC_ARGUMENT(type) const type&
#define KVC_UNROLL
#define KVC_ROLLED

// The library is compiled once for each way of copying.
#ifndef KVC_BULK_COPIES
#define KVC_BULK_COPIES 0
#endif

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

namespace kvcompress::cuda {

struct Grid {
    int x, y, z;
};

namespace emulate {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

// Threads that meet: a warp, or the block.
struct Meeting {
    int size = 0, arrived = 0;
    unsigned rounds = 0;
    const char* name = nullptr;
};

struct Warp {
    Meeting meeting;
    uint32_t a[kLanes][4], b[kLanes][2], word[kLanes];
    const uint8_t* row[kLanes];
    float c[kLanes][4];
    bool vote = false;
};

struct Barrier {
    uint32_t phase = 0;
    size_t expected = 0, asked = 0;  // bytes
    std::vector<Copy> copies;
};

struct Block {
    Grid grid{}, index{};
    int threads = 0, current = 0, alive = 0;
    int64_t idle = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting meeting;
    std::unique_ptr<uint8_t[]> memory;
    uint8_t* shared = nullptr;
    std::map<uint64_t*, Barrier> barriers;
    jmp_buf finished;
    void (*body)(const void*) = nullptr;
    const void* args = nullptr;
};

inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* what, const char* name) {
    fprintf(stderr, "emulated CUDA: %s (%s), thread %d of block (%d, %d, %d)\n", what, name, block->current,
            block->index.x, block->index.y, block->index.z);
    abort();
}

inline void run_fiber() {
    block->body(block->args);
    Fiber& self = block->fibers[static_cast<size_t>(block->current)];
    self.done = true;
    block->idle = 0;
    if (--block->alive == 0) _longjmp(block->finished, 1);
    for (;;) {
        block->current = (block->current + 1) % block->threads;
        Fiber& next = block->fibers[static_cast<size_t>(block->current)];
        if (next.done) continue;
        if (next.started) _longjmp(next.resume, 1);
        next.started = true;
        setcontext(&next.start);
    }
}

[[gnu::noinline]] inline void yield(const char* name) {
    if (++block->idle > 16 * block->threads) fail("threads wait for each other", name);
    if (_setjmp(block->fibers[static_cast<size_t>(block->current)].resume)) return;
    do block->current = (block->current + 1) % block->threads;
    while (block->fibers[static_cast<size_t>(block->current)].done);
    Fiber& next = block->fibers[static_cast<size_t>(block->current)];
    if (next.started) _longjmp(next.resume, 1);
    next.started = true;
    setcontext(&next.start);
}

// Wait for all; the last one to come acts for all.
template <typename Act>
void meet(Meeting& meeting, const char* name, const Act& act) {
    if (meeting.arrived && meeting.name != name) fail("lanes diverge", name);
    meeting.name = name;
    if (++meeting.arrived == meeting.size) {
        act();
        meeting.arrived = 0;
        ++meeting.rounds;
        block->idle = 0;
        return;
    }
    const unsigned round = meeting.rounds;
    while (meeting.rounds == round) yield(name);
}

inline Warp& warp() { return block->warps[static_cast<size_t>(block->current / kLanes)]; }
inline int lane() { return block->current % kLanes; }

template <typename T>
T exchange(T x, int lanes, const char* name) {
    static_assert(sizeof(T) == 4);
    Warp& w = warp();
    memcpy(&w.word[lane()], &x, 4);
    meet(w.meeting, name, [] {});
    memcpy(&x, &w.word[lane() ^ lanes], 4);
    meet(w.meeting, name, [] {});  // everybody has read
    return x;
}

inline float half_value(uint32_t pair, int e) {
    const uint32_t half = pair >> (16 * e) & 0xffff, low = (half & 0x7fff) << 13;
    float magnitude;
    memcpy(&magnitude, &low, 4);
    magnitude *= 0x1p112f;
    if ((half & 0x7c00) == 0x7c00) magnitude = half & 0x3ff ? NAN : INFINITY;
    return half & 0x8000 ? -magnitude : magnitude;
}

// Nearest, ties to even.
inline uint16_t nearest_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (x != x) return sign | 0x7e00;
    if (fabsf(x) >= 65520.f) return sign | 0x7c00;
    if (fabsf(x) < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(fabsf(x) * 0x1p24f)));
    return static_cast<uint16_t>(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

inline float bfloat_value(uint32_t pair, int e) {
    const uint32_t bits = e ? pair & 0xffff0000 : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint16_t nearest_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float towards_zero(double x) {
    const auto nearest = static_cast<float>(x);
    return fabs(static_cast<double>(nearest)) > fabs(x) && isfinite(nearest) ? nextafterf(nearest, 0.f) : nearest;
}

template <float (*VALUE)(uint32_t, int)>
void multiply(Warp& w) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < 2; ++e) {
            for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = VALUE(w.a[lane][i], e);
            for (int i = 0; i < 2; ++i) b[2 * t + e + 8 * i][g] = VALUE(w.b[lane][i], e);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = static_cast<double>(w.c[lane][i]);
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
            w.c[lane][i] = towards_zero(sum);
        }
}

template <typename Args, void (*KERNEL)(const Args&)>
void call(const void* args) {
    KERNEL(*static_cast<const Args*>(args));
}

inline void run_block(Block& it, int64_t shared_bytes) {
    block = &it;
    const auto bytes = static_cast<size_t>(shared_bytes);
    it.memory = std::make_unique<uint8_t[]>(bytes + 128);
    it.shared = it.memory.get() + (128 - reinterpret_cast<uintptr_t>(it.memory.get()) % 128);
    memset(it.shared, 0xff, bytes);
    it.fibers.resize(static_cast<size_t>(it.threads));
    it.warps.resize(static_cast<size_t>(it.threads / kLanes));
    for (Warp& warp : it.warps) warp.meeting.size = kLanes;
    it.meeting.size = it.alive = it.threads;
    for (Fiber& fiber : it.fibers) {
        fiber.stack.reset(new char[kStackBytes]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    // The first thread, which often prepares something for all, is the last to begin.
    it.current = it.threads > 1;
    if (!_setjmp(it.finished)) {
        Fiber& first = it.fibers[static_cast<size_t>(it.current)];
        first.started = true;
        setcontext(&first.start);
    }
    block = nullptr;
}

}  // namespace emulate

inline int thread_index() { return emulate::block->current; }
inline int num_threads() { return emulate::block->threads; }
inline int block_x() { return emulate::block->index.x; }
inline int block_y() { return emulate::block->index.y; }
inline int block_z() { return emulate::block->index.z; }
inline int grid_x() { return emulate::block->grid.x; }
inline uint8_t* shared_memory() { return emulate::block->shared; }

inline void sync_block() {
    emulate::meet(emulate::block->meeting, "sync_block", [] {});
}
inline void sync_warp() {
    emulate::meet(emulate::warp().meeting, "sync_warp", [] {});
}
inline float shuffle_xor(float x, int lanes) { return emulate::exchange(x, lanes, "shuffle_xor"); }
inline int shuffle_xor(int x, int lanes) { return emulate::exchange(x, lanes, "shuffle_xor"); }
inline bool any_lane(bool x) {
    emulate::Warp& w = emulate::warp();
    w.word[emulate::lane()] = x;
    emulate::meet(w.meeting, "any_lane", [&] {
        w.vote = false;
        for (const uint32_t word : w.word) w.vote |= word != 0;
    });
    return w.vote;
}

template <uint32_t MASK, uint32_t BITS>
uint32_t mask_or(uint32_t a) {
    return (a & MASK) | BITS;
}

template <uint32_t SELECTOR>
uint32_t bytes_of(uint32_t a, uint32_t b) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(both >> (8 * (SELECTOR >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}

inline float half_to_float(uint16_t half) { return emulate::half_value(half, 0); }
inline uint16_t float_to_half(float x) { return emulate::nearest_half(x); }
inline uint32_t halves_of(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    float x[2];
    for (int e = 0; e < 2; ++e) {
        const double product =
            static_cast<double>(emulate::half_value(a, e)) * static_cast<double>(emulate::half_value(b, e));
        x[e] = static_cast<float>(product + static_cast<double>(emulate::half_value(c, e)));
    }
    return halves_of(x[0], x[1]);
}
inline uint32_t halves_times(uint32_t a, uint32_t b) {
    return halves_of(emulate::half_value(a, 0) * emulate::half_value(b, 0),
                     emulate::half_value(a, 1) * emulate::half_value(b, 1));
}
inline float exp2_of(float x) { return exp2f(x); }
inline float log2_of(float x) { return log2f(x); }
// As far off as the device's may be.
inline float sin_of(float x) { return sinf(x) + 0x1p-21f; }
inline float cos_of(float x) { return cosf(x) - 0x1p-21f; }

namespace emulate {

template <float (*VALUE)(uint32_t, int)>
void meet_to_multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp& w = warp();
    memcpy(w.a[lane()], a, sizeof a);
    memcpy(w.b[lane()], b, sizeof b);
    memcpy(w.c[lane()], c, sizeof c);
    meet(w.meeting, name, [&] { multiply<VALUE>(w); });
    memcpy(c, w.c[lane()], sizeof c);
}

}  // namespace emulate

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, const uint32_t (&b)[2]) {
    emulate::meet_to_multiply<emulate::half_value>("mma", c, {a0, a1, a2, a3}, b);
}
inline uint32_t bfloats_of(float low, float high) {
    return emulate::nearest_bfloat(low) | static_cast<uint32_t>(emulate::nearest_bfloat(high)) << 16;
}
inline void mma_bfloat16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, const uint32_t (&b)[2]) {
    emulate::meet_to_multiply<emulate::bfloat_value>("mma_bfloat16", c, {a0, a1, a2, a3}, b);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&matrix)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("a row is not aligned", "load_matrices");
    emulate::Warp& w = emulate::warp();
    const int lane = emulate::lane(), g = lane / 4, t = lane % 4;
    w.row[lane] = static_cast<const uint8_t*>(row);
    emulate::meet(w.meeting, "load_matrices", [] {});
    const auto entry = [&](int i, int at, int number) {
        uint16_t x;
        memcpy(&x, w.row[8 * i + at] + 2 * number, 2);
        return static_cast<uint32_t>(x);
    };
    for (int i = 0; i < 4; ++i)
        matrix[i] = TRANSPOSED ? entry(i, 2 * t, g) | entry(i, 2 * t + 1, g) << 16
                               : entry(i, g, 2 * t) | entry(i, g, 2 * t + 1) << 16;
    emulate::meet(w.meeting, "load_matrices", [] {});
}

inline uint32_t transpose(uint32_t a) {
    emulate::Warp& w = emulate::warp();
    const int lane = emulate::lane(), g = lane / 4, t = lane % 4;
    w.word[lane] = a;
    emulate::meet(w.meeting, "transpose", [] {});
    const auto entry = [&](int row, int column) {
        return w.word[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
    };
    const uint32_t result = entry(2 * t, g) | entry(2 * t + 1, g) << 16;
    emulate::meet(w.meeting, "transpose", [] {});
    return result;
}

inline void add_shared(float* p, float x) { *p += x; }
inline void flip_bits(uint32_t* p, uint32_t bits) { *p ^= bits; }

inline void copy_16_bytes(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        emulate::fail("a copy is not aligned", "copy_16_bytes");
    // A copy may come at any time until it is waited for: at the latest, with what was there gone at once, or, if a test
    // asks for it, at once.
    if (getenv("KVC_EMULATED_EARLY_COPIES"))
        memcpy(shared, global, 16);
    else
        memset(shared, 0xff, 16);
    emulate::block->fibers[static_cast<size_t>(emulate::block->current)].open.push_back({shared, global, 16});
}
inline void commit_copies() {
    emulate::Fiber& self = emulate::block->fibers[static_cast<size_t>(emulate::block->current)];
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
template <int GROUPS>
void wait_copies_but() {
    auto& groups = emulate::block->fibers[static_cast<size_t>(emulate::block->current)].groups;
    while (groups.size() > GROUPS) {
        for (const emulate::Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

inline void init_barrier(uint64_t* barrier) { emulate::block->barriers[barrier] = {}; }
inline void publish_barriers() {}
inline void expect_bytes(uint64_t* barrier, int bytes) {
    emulate::Barrier& it = emulate::block->barriers.at(barrier);
    if (it.expected) emulate::fail("a barrier is told twice what to expect", "expect_bytes");
    it.expected = static_cast<size_t>(bytes);
    emulate::block->idle = 0;
}
inline void copy_bulk_of(void* shared, const void* global, int bytes, uint64_t* barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        emulate::fail("a copy is not aligned", "copy_bulk");
    emulate::Barrier& it = emulate::block->barriers.at(barrier);
    memset(shared, 0xff, static_cast<size_t>(bytes));
    it.copies.push_back({shared, global, static_cast<size_t>(bytes)});
    it.asked += static_cast<size_t>(bytes);
    emulate::block->idle = 0;
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    expect_bytes(barrier, bytes);
    copy_bulk_of(shared, global, bytes, barrier);
}
inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
    emulate::Barrier& it = emulate::block->barriers.at(barrier);
    while (it.phase == parity) {
        if (!it.expected || it.asked != it.expected) {
            emulate::yield("wait_barrier");
            continue;
        }
        for (const emulate::Copy& copy : it.copies) memcpy(copy.to, copy.from, copy.bytes);
        it.copies.clear();
        it.expected = it.asked = 0;
        it.phase ^= 1;
    }
}

template <auto KERNEL, typename Args>
int launch(Grid grid, int threads, int64_t shared_bytes, void*, const Args& args) {
    for (int z = 0; z < grid.z; ++z)
        for (int y = 0; y < grid.y; ++y)
            for (int x = 0; x < grid.x; ++x) {
                emulate::Block block;
                block.grid = grid;
                block.index = {x, y, z};
                block.threads = threads;
                block.body = emulate::call<Args, KERNEL>;
                block.args = &args;
                emulate::run_block(block, shared_bytes);
            }
    return 0;
}

// A test may want a smaller GPU.
inline int shared_limit(int64_t& limit) {
    const char* chosen = getenv("KVC_EMULATED_SHARED_BYTES");
    limit = chosen ? atoll(chosen) : 227 * 1024;
    return 0;
}
inline const char* error_text(int) { return "an error of the emulation"; }

}  // namespace kvcompress::cuda
