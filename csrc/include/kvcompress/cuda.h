// C interface of the CUDA kernels, which work on pages in fragment order (kvcompress/codec/heads/fragment.py). Structs of pages
// and rows are the CPU kernels'; their pointers are the device's, and a side's offsets are within a chunk of 64 tokens.
// Calls start work on a stream and return: 0, or the number of a CUDA error, or one of kvc_status below 0.
#ifndef KVCOMPRESS_CUDA_H
#define KVCOMPRESS_CUDA_H

#include "kvcompress/cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a struct below or the meaning of an argument changes.
#define KVC_CUDA_ABI_VERSION 2

typedef struct {
    kvc_pages pages;
    const float* query_THR;  // absorbed: query times k_decode, [tokens, num_heads, k.rank] contiguous
    float* output_THR;       // mixed latents in units of the static scale, [tokens, num_heads, v.rank] contiguous
    float* lse_TH;           // without the share of the keys' mean, [tokens, num_heads] contiguous
    float* workspace;        // splits * tokens * num_heads * (v.rank + 1) floats; may be null for one split
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts;  // [num_requests + 1]
    const int32_t* seq_lens;      // [num_requests], a request's queries included
    int64_t num_tokens;
    int32_t num_requests;
    int32_t max_query_len;  // of any request
    int32_t num_heads;
    int32_t splits;
    float softmax_scale;
    void* stream;
} kvc_cuda_attend_args;

typedef struct {
    kvc_pages pages;
    kvc_rows keys;
    kvc_rows values;
    const int64_t* slots;   // of each token; below 0 or outside the cache: skipped
    const int64_t* blocks;  // instead of slots: tokens fill these blocks one after the other
    int64_t num_tokens;
    const float *k_mean_HD, *k_encode_HDR, *k_weight_HR;
    const float *v_mean_HD, *v_encode_HDR, *v_weight_HR;
    void* stream;
} kvc_cuda_append_args;

typedef struct {
    kvc_pages pages;
    void* keys_THR;  // normalized latents [num_tokens, num_kv_heads, rank] contiguous
    void* values_THR;
    int32_t dtype;
    const int32_t* block_table;  // of one request
    int64_t num_tokens;
    void* stream;
} kvc_cuda_gather_args;

KVC_EXPORT int32_t kvc_cuda_abi_version(void);

// sizeof of the structs above, in their order.
KVC_EXPORT void kvc_cuda_struct_sizes(int64_t sizes[3]);

KVC_EXPORT const char* kvc_cuda_error_text(int32_t error);

// KVC_OK if the current device has room for what attention keeps of such pages in shared memory, else -KVC_BAD_SHAPE.
KVC_EXPORT int32_t kvc_cuda_covers(const kvc_pages* pages);

// Causal attention of every request's last query_starts[r+1] - query_starts[r] tokens over all its seq_lens[r] tokens.
// Lengths are read by the device, so a captured call can be replayed with others.
KVC_EXPORT int32_t kvc_cuda_attend(const kvc_cuda_attend_args* args);

// Encode tokens and store them: in their slots, or as whole blocks.
KVC_EXPORT int32_t kvc_cuda_append(const kvc_cuda_append_args* args);

// Decode a request's tokens.
KVC_EXPORT int32_t kvc_cuda_gather(const kvc_cuda_gather_args* args);

#ifdef __cplusplus
}
#endif

#endif
