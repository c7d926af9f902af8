// C interface of the CUDA kernels for MLA latents: see cuda.h for what holds for all, and cpu.h for the structs. Pages,
// queries, outputs and keys are of one type.
#ifndef KVCOMPRESS_CUDA_LATENT_H
#define KVCOMPRESS_CUDA_LATENT_H

#include "kvcompress/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    kvc_latent_pages pages;  // bfloat16 or float16, tokens on 16 bytes, channels a multiple of 16
    kvc_rows query;          // [tokens, num_heads, channels], absorbed; rows on 4 bytes
    kvc_rows output;         // [tokens, num_heads, rank]
    float* workspace;        // splits * tokens * num_heads * (rank rounded up to 16, + 1) floats; may be null for one split
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts;  // [num_requests + 1]
    const int32_t* seq_lens;      // [num_requests], a request's queries included
    int64_t num_tokens;
    int32_t num_requests;
    int32_t max_query_len;  // of any request
    int32_t num_heads;
    int32_t rank;
    int32_t splits;
    float softmax_scale;
    void* stream;
} kvc_cuda_latent_attend_args;

typedef struct {
    kvc_latent_pages pages;
    kvc_rows keys;  // [tokens, 1, channels]
    const int64_t* slots;  // below 0 or outside the cache: skipped
    int64_t num_tokens;
    void* stream;
} kvc_cuda_latent_append_args;

// sizeof of the structs above, in their order.
KVC_EXPORT void kvc_cuda_latent_struct_sizes(int64_t sizes[2]);

// The most channels that attention has room for on the current device.
KVC_EXPORT int32_t kvc_cuda_latent_most_channels(int32_t* channels);

// As kvc_cuda_attend, for latents; the result is in latent space. Padding behind the last request is not written.
KVC_EXPORT int32_t kvc_cuda_latent_attend(const kvc_cuda_latent_attend_args* args);

// Store tokens in their slots.
KVC_EXPORT int32_t kvc_cuda_latent_append(const kvc_cuda_latent_append_args* args);

#ifdef __cplusplus
}
#endif

#endif
