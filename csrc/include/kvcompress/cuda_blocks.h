// C interface of the CUDA kernels for the form `blocks` (kvcompress/codec/blocks/codec.py). Pages, rings and rows are as the CPU's
// kernels have them, byte for byte; their pointers are the device's. Calls start work on a stream and return as those
// of cuda.h do.
#ifndef KVCOMPRESS_CUDA_BLOCKS_H
#define KVCOMPRESS_CUDA_BLOCKS_H

#include "kvcompress/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// Complete blocks alone.
typedef struct {
    kvc_block_pages pages;
    const float* query_THR;  // absorbed: query times k_decode, [tokens, num_heads, k.rank] contiguous
    float* output_THR;       // mixed latents, [tokens, num_heads, v.rank] contiguous; 0 without a complete block
    float* lse_TH;           // without the share of the keys' mean, [tokens, num_heads] contiguous
    float* workspace;        // splits * tokens * num_heads * (v.rank + 1) floats; may be null for one split
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts;  // [num_requests + 1]
    const int32_t* seq_lens;      // [num_requests], a request's queries included
    int64_t num_tokens;
    int32_t num_requests;
    int32_t max_query_len;
    int32_t num_heads;
    int32_t splits;
    float softmax_scale;
    void* stream;
} kvc_cuda_block_attend_args;

// The newest tokens, and merging with the above. Keys, values and rings begin and stride in multiples of 16 bytes.
typedef struct {
    kvc_rings rings;
    kvc_rows query;
    kvc_rows keys;
    kvc_rows values;
    kvc_rows output;
    const float* sealed_THD;      // mixed latents times v_decode, [tokens, num_heads, head_dim] contiguous
    const float* sealed_lse_TH;   // as kvc_cuda_attend_blocks writes it
    float* lse_TH;                // of everything, contiguous; may be null
    const float *k_mean_HD, *v_mean_HD;
    const int32_t* ring_of;       // [num_requests]
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int32_t block;
    int32_t num_requests;
    int32_t max_query_len;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    float softmax_scale;
    void* stream;
} kvc_cuda_newest_args;

typedef struct {
    kvc_rings rings;
    kvc_rows keys;
    kvc_rows values;
    const int32_t* ring_of;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int64_t num_tokens;  // rows of keys and values; those after the last request's are padding
    int32_t num_requests;
    int32_t num_kv_heads;
    int32_t head_dim;
    void* stream;
} kvc_cuda_keep_args;

// sizeof of the structs above, in their order.
KVC_EXPORT void kvc_cuda_block_struct_sizes(int64_t sizes[3]);

KVC_EXPORT int32_t kvc_cuda_attend_blocks(const kvc_cuda_block_attend_args* args);
KVC_EXPORT int32_t kvc_cuda_attend_newest(const kvc_cuda_newest_args* args);

// The step's tokens into their requests' rings, as many as fit: attention has read what they take the places of.
KVC_EXPORT int32_t kvc_cuda_keep(const kvc_cuda_keep_args* args);

#ifdef __cplusplus
}
#endif

#endif
