// C interface of the CUDA kernels of layers that share a latent (kvcompress/codec/shared/codec.py). Records are in the order
// of the CPU's pages; pointers are the device's. Calls start work on a stream and return what those of cuda.h do.
#ifndef KVCOMPRESS_CUDA_SHARED_H
#define KVCOMPRESS_CUDA_SHARED_H

#include "kvcompress/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_MAX_STRIPES 32

typedef struct {
    const kvc_records* k; // num_k: one per stripe, or one with a record per KV head
    const kvc_records* v; // num_stripes
    int32_t num_k;
    int32_t num_stripes;
    kvc_rows query;              // shared keys: after RoPE; own: [tokens, num_heads, k_channels], absorbed, float32
    kvc_rows keys;               // the step's own tokens, [tokens, num_kv_heads, head_dim], after RoPE
    kvc_rows values;
    int32_t k_channels;          // own keys: 16 per tile; shared keys: 64, 128 or 256, head_dim and padding
    const void* k_decode;        // shared keys: halves, in the order of csrc/cuda/shared/scores.h; null: keys are own
    const float* k_decode_unit;  // [num_kv_heads]
    const float* k_mean;         // [num_kv_heads, k_channels]
    const float* rope_frequency; // [k_channels / 2]
    const float* rope_amplitude; // [1]
    float* scores;               // [requests_at_once, max_query_len, num_heads, score_stride]
    int64_t score_stride;        // tokens of the longest request, or more: a multiple of 64
    float* mixed_THR;            // of stored tokens: latents of values, [tokens, num_heads, num_stripes * v.rank]
    float* mixed_lse_TH;
    float* exact_THD;            // of the step's own tokens: [tokens, num_heads, head_dim]
    float* exact_lse_TH;
    float* workspace;            // mix_splits * tokens * num_heads * (num_stripes * v.rank + 1); may be null for one
    const int32_t* query_starts; // [num_requests + 1]
    const int32_t* seq_lens;     // [num_requests], a request's queries included
    const int32_t* stored_lens;  // as kvc_shared_attend_args has them
    const int32_t* exact_rows;   // -1: as it is stored after all
    const int32_t* exact_starts;
    int64_t num_tokens;
    int32_t num_requests;
    int32_t requests_at_once;
    int32_t max_query_len; // of any request
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t score_splits;
    int32_t mix_splits;
    float softmax_scale;
    void* stream;
} kvc_cuda_shared_attend_args;

typedef struct {
    kvc_records records;
    kvc_rows latents; // float32 [tokens, records, rank], normalized
    const float* weight_HR;
    const int64_t* slots; // below 0 or outside the cache: skipped
    int64_t num_tokens;
    void* stream;
} kvc_cuda_store_args;

// sizeof of the structs above, in their order.
KVC_EXPORT void kvc_cuda_shared_struct_sizes(int64_t sizes[2]);

// Causal attention of every request's last tokens over all of them in two parts, each with the log of its sum of
// exponentials: stored tokens, whose values are still latents, and tokens of the step as they are.
KVC_EXPORT int32_t kvc_cuda_shared_attend(const kvc_cuda_shared_attend_args* args);

// Encode latents and store them as records.
KVC_EXPORT int32_t kvc_cuda_store(const kvc_cuda_store_args* args);

#ifdef __cplusplus
}
#endif

#endif
