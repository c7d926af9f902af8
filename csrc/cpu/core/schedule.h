// Division of attention's work among threads, for every form of cache.
//
// Long contexts are cut into splits at fixed token positions, independent of the batch and of the number of threads, and
// partial results are merged in order. A row's result therefore depends on nothing but its own tokens, bit for bit.
#pragma once

#include "cpu/core/kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace kvcompress::cpu {

// The kernels of the level asked for, or of the best this machine has.
const Kernels& kernels_of(int level);

// Whether the kernels unpack codes of a width.
bool is_code(int bits);

// Whether the kernels can compute a side with up to `channels` channels; offsets are the caller's to check.
bool covered(const kvc_side& side, int channels);

// What the scheduler asks of a form's arguments, beside the fields that all of them have. Each form specialises it:
//   static int kv_heads(const Args&);
//   static bool together;  // several KV heads make one item while their rows fit
//   static int32_t check(const Args&, int request, int length);  // kvc_status of the request's tables
template <typename Args>
struct Form;

inline size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Memory every thread keeps between calls.
inline char* scratch(size_t bytes) {
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<char, Free> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset(static_cast<char*>(std::aligned_alloc(kAlign, aligned(bytes))));
        if (memory) size = bytes;
    }
    return memory.get();
}

// Call body(i) for every i below `count`, which threads take one by one: a thread that the machine keeps busy with other
// work leaves the rest to others. False if a thread found no memory.
template <typename Body>
bool parallel(int64_t count, int threads, size_t scratch_bytes, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    std::atomic<int64_t> next{0};
    std::atomic<bool> ok{true};
    const auto work = [&] {
        char* memory = scratch(scratch_bytes);
        if (!memory) {
            ok = false;
            return;
        }
        for (int64_t i = next++; i < count; i = next++) body(i, memory);
    };
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work();
        return ok;
    }
#endif
    work();
    return ok;
}

// One item's splits: their partial results and how many are still being computed.
struct Job {
    Item item;
    int visible;  // tokens any of its rows sees
    int splits;
    std::vector<float> memory;
    std::unique_ptr<std::atomic<int>> pending;
};

inline size_t partial_floats(const Item& item, int width) {
    return static_cast<size_t>(item.rows()) * static_cast<size_t>(width + 2);
}

inline Partial partial_at(float* memory, const Item& item) {
    const int rows = item.rows();
    return {memory, memory + rows, memory + 2 * rows};
}

// How many query tokens share an unpacked tile. Few rows make unpacking expensive; many leave threads without work.
inline int tokens_per_item(int queries, int group) {
    const int most = kMaxRows / group;
    return queries < most ? queries : most;
}

template <typename Args>
int32_t make_jobs(const Args& args, std::vector<Job>& jobs) {
    const int heads = Form<Args>::kv_heads(args), group_size = args.batch.num_heads / heads;
    for (int request = 0; request < args.batch.num_requests; ++request) {
        const int length = args.batch.seq_lens[request];
        const int queries = args.batch.query_starts[request + 1] - args.batch.query_starts[request];
        if (queries == 0) continue;
        if (queries < 0 || queries > length) return KVC_BAD_LENGTH;
        const int32_t status = Form<Args>::check(args, request, length);
        if (status != KVC_OK) return status;
        for (int first_group = 0; first_group < group_size; first_group += kMaxRows) {
            const int group = group_size - first_group < kMaxRows ? group_size - first_group : kMaxRows;
            const int step = tokens_per_item(queries, group);
            const int most = kMaxRows / (step * group);
            const int together = !Form<Args>::together ? 1 : most < heads ? most : heads;
            for (int token = 0; token < queries; token += step)
                for (int head = 0; head < heads; head += together) {
                    Job job{};
                    job.item = {request,
                                head,
                                token,
                                queries - token < step ? queries - token : step,
                                first_group,
                                group,
                                heads - head < together ? heads - head : together};
                    job.visible = length - queries + token + job.item.tokens;
                    job.splits = (job.visible + args.run.split_tokens - 1) / args.run.split_tokens;
                    jobs.push_back(std::move(job));
                }
        }
    }
    return KVC_OK;
}

template <typename Args>
int stop_of(const Args& args, const Job& job, int split) {
    const int64_t stop = static_cast<int64_t>(split + 1) * args.run.split_tokens;
    return stop < job.visible ? static_cast<int>(stop) : job.visible;
}

// Enough items for every thread: each goes through its splits alone, and memory does not grow with the context.
template <typename Args>
bool attend_whole(const Args& args, const Attention<Args>& kernels, const std::vector<Job>& jobs) {
    const size_t scratch_bytes = aligned(kernels.scratch_bytes(args));
    const size_t partial_bytes = aligned(sizeof(float) * kMaxRows * static_cast<size_t>(kernels.width(args) + 2));
    return parallel(static_cast<int64_t>(jobs.size()), args.run.threads, scratch_bytes + 2 * partial_bytes,
                    [&](int64_t index, char* memory) {
                        // Last first: a prefill's last rows see the most tokens.
                        const Job& job = jobs[jobs.size() - 1 - static_cast<size_t>(index)];
                        const Partial total = partial_at(reinterpret_cast<float*>(memory + scratch_bytes), job.item);
                        const Partial part =
                            partial_at(reinterpret_cast<float*>(memory + scratch_bytes + partial_bytes), job.item);
                        for (int split = 0; split < job.splits; ++split) {
                            kernels.attend(args, job.item, split * args.run.split_tokens, stop_of(args, job, split),
                                           split ? part : total, memory);
                            if (split) kernels.merge(args, job.item, total, part);
                        }
                        kernels.finish(args, job.item, total, memory);
                    });
}

// Few items, long contexts: splits go to different threads, and whoever computes an item's last one merges them in order.
template <typename Args>
bool attend_split(const Args& args, const Attention<Args>& kernels, std::vector<Job>& jobs) {
    std::vector<std::pair<int, int>> tasks;
    for (size_t i = 0; i < jobs.size(); ++i) {
        Job& job = jobs[i];
        job.memory.resize(partial_floats(job.item, kernels.width(args)) * static_cast<size_t>(job.splits));
        job.pending = std::make_unique<std::atomic<int>>(job.splits);
        for (int split = 0; split < job.splits; ++split) tasks.emplace_back(static_cast<int>(i), split);
    }
    const size_t scratch_bytes = kernels.scratch_bytes(args);
    return parallel(static_cast<int64_t>(tasks.size()), args.run.threads, scratch_bytes,
                    [&](int64_t index, char* memory) {
                        Job& job = jobs[static_cast<size_t>(tasks[static_cast<size_t>(index)].first)];
                        const int split = tasks[static_cast<size_t>(index)].second;
                        const size_t stride = partial_floats(job.item, kernels.width(args));
                        const auto partial = [&](int i) {
                            return partial_at(job.memory.data() + stride * static_cast<size_t>(i), job.item);
                        };
                        kernels.attend(args, job.item, split * args.run.split_tokens, stop_of(args, job, split),
                                       partial(split), memory);
                        if (--*job.pending) return;
                        for (int i = 1; i < job.splits; ++i) kernels.merge(args, job.item, partial(0), partial(i));
                        kernels.finish(args, job.item, partial(0), memory);
                    });
}

// Attend all requests; `kernels` are those of the level the caller has chosen.
template <typename Args>
int32_t schedule(const Args& args, const Attention<Args>& kernels) {
    try {
        std::vector<Job> jobs;
        const int32_t status = make_jobs(args, jobs);
        if (status != KVC_OK || jobs.empty()) return status;
        const bool enough = static_cast<int64_t>(jobs.size()) >= 8 * static_cast<int64_t>(args.run.threads);
        const bool ok = enough ? attend_whole(args, kernels, jobs) : attend_split(args, kernels, jobs);
        return ok ? KVC_OK : KVC_NO_MEMORY;
    } catch (const std::bad_alloc&) {
        return KVC_NO_MEMORY;
    }
}

// Whether a call's rows and splits are ones that the kernels know; splits are whole `unit`s.
inline bool covered(const kvc_batch& batch, const kvc_run& run, int kv_heads, int unit) {
    return batch.num_heads > 0 && batch.num_heads % kv_heads == 0 && run.split_tokens > 0 &&
           run.split_tokens % unit == 0;
}

inline bool check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
    return std::all_of(slots, slots + num_tokens, [=](int64_t slot) { return slot < num_slots; });
}

// KVC_OK if a request's row of a block table has blocks of the cache for its first `tokens` tokens.
inline int32_t check_blocks(const int32_t* block_table, int64_t stride, int request, int tokens, int block_size,
                            int64_t num_blocks) {
    const int blocks = (tokens + block_size - 1) / block_size;
    if (tokens < 0 || blocks > stride) return KVC_BAD_LENGTH;
    for (int i = 0; i < blocks; ++i) {
        const int32_t block = block_table[request * stride + i];
        if (block < 0 || block >= num_blocks) return KVC_BAD_BLOCK;
    }
    return KVC_OK;
}

inline int32_t check_blocks(const kvc_batch& batch, int request, int tokens, int block_size, int64_t num_blocks) {
    return check_blocks(batch.block_table, batch.block_table_stride, request, tokens, block_size, num_blocks);
}

}  // namespace kvcompress::cpu
