// Written by kvcompress/ops/interface/header.py.
//
// Pages of form `latent`: one vector per token, its first channels the latent, is the key of all heads, the latent the
// value.
#pragma once

#include "kvcompress/common.h"

// [num_blocks, block_size, channels] of numbers; strides in elements, channels contiguous.
// The CUDA kernels attend bfloat16 or float16, tokens on 16 bytes, channels a multiple of 16.
typedef struct {
    void* data;
    int64_t num_blocks;
    int64_t block_stride;
    int64_t token_stride;
    int32_t block_size;
    int32_t channels;
    int32_t dtype;
} kvc_latent_pages;
static_assert(sizeof(kvc_latent_pages) == 48);

typedef struct {
    kvc_latent_pages pages;
    kvc_rows keys;  // [tokens, 1, channels]; on CUDA in the pages' number format
    const int64_t* slots;  // below 0: skipped, and on CUDA also outside the cache
    int64_t num_tokens;
    kvc_run run;
} kvc_latent_append_args;
static_assert(sizeof(kvc_latent_append_args) == 144);

typedef struct {
    kvc_latent_pages pages;
    kvc_rows query;  // [tokens, num_heads, channels], absorbed; on CUDA in the pages' format, rows on 4 bytes
    kvc_rows output;  // [tokens, num_heads, rank]
    kvc_batch batch;
    int32_t rank;  // in a workspace rounded up to 16
    kvc_run run;
} kvc_latent_attend_args;
static_assert(sizeof(kvc_latent_attend_args) == 216);

// Store tokens in their slots in the pages' number format.
KVC_EXPORT int32_t kvc_latent_append(const kvc_latent_append_args* args);

// Attention whose result is in latent space.
KVC_EXPORT int32_t kvc_latent_attend(const kvc_latent_attend_args* args);

// The most channels that attention has room for on the current device.
KVC_EXPORT int32_t kvc_cuda_latent_most_channels(int32_t* channels);

// Store tokens in their slots.
KVC_EXPORT int32_t kvc_cuda_latent_append(const kvc_latent_append_args* args);

// As above; padding behind the last request is not written.
KVC_EXPORT int32_t kvc_cuda_latent_attend(const kvc_latent_attend_args* args);
