// Written by kvcompress/ops/interface/header.py.
//
// Pages of form `heads`: a record per token and head.
#pragma once

#include "kvcompress/common.h"

#define KVC_HEADS_CUDA_MAX_RANK 256
#define KVC_HEADS_CUDA_MAX_TILES 17
#define KVC_HEADS_CUDA_WIDTHS(X) X(16, 16) X(8, 8) X(8, 4) X(4, 4) X(4, 2) X(2, 2) X(0, 0)

// uint8 [num_blocks, num_kv_heads, record]; strides in bytes. On CUDA in fragment order.
typedef struct {
    uint8_t* data;
    int64_t num_blocks;
    int64_t block_stride;
    int64_t head_stride;
    int32_t block_size;
    int32_t num_kv_heads;
    int32_t head_dim;
    kvc_side k;
    kvc_side v;
} kvc_heads_pages;
static_assert(sizeof(kvc_heads_pages) == 256);

// What makes latents of keys or values.
typedef struct {
    const float* mean_HD;
    const float* encode_HDR;
    const float* weight_HR;
} kvc_heads_encoder;
static_assert(sizeof(kvc_heads_encoder) == 24);

typedef struct {
    kvc_heads_pages pages;
    kvc_rows keys;
    kvc_rows values;
    const int64_t* slots;  // of each token; below 0: skipped, and on CUDA also outside the cache
    const int64_t* blocks;  // CUDA, instead of slots: tokens fill these blocks one after the other
    int64_t num_tokens;
    kvc_heads_encoder k;
    kvc_heads_encoder v;
    kvc_run run;
} kvc_heads_append_args;
static_assert(sizeof(kvc_heads_append_args) == 440);

typedef struct {
    kvc_heads_pages pages;
    kvc_rows query;
    kvc_rows output;
    float* lse_TH;  // may be null; otherwise [tokens, num_heads] contiguous
    const float* k_decode_HDR;  // transposed: a query's absorption adds rows
    const float* k_mean_HD;
    const float* v_decode_HRD;
    const float* v_mean_HD;
    kvc_batch batch;
    kvc_run run;
} kvc_heads_attend_args;
static_assert(sizeof(kvc_heads_attend_args) == 456);

typedef struct {
    kvc_heads_pages pages;
    void* keys_THR;  // normalized latents [num_tokens, num_kv_heads, rank] contiguous
    void* values_THR;
    int32_t dtype;
    const int32_t* block_table;  // of one request
    int64_t num_tokens;
    void* stream;
} kvc_heads_gather_args;
static_assert(sizeof(kvc_heads_gather_args) == 304);

// Encode tokens and store them in their slots.
KVC_EXPORT int32_t kvc_heads_append(const kvc_heads_append_args* args);

// Attention on tokens as they are stored.
KVC_EXPORT int32_t kvc_heads_attend(const kvc_heads_attend_args* args);

// KVC_OK if the current device has room for what attention keeps of such pages in shared memory, else -KVC_BAD_SHAPE.
KVC_EXPORT int32_t kvc_cuda_heads_covers(const kvc_heads_pages* args);

// Encode tokens and store them: in their slots, or as whole blocks.
KVC_EXPORT int32_t kvc_cuda_heads_append(const kvc_heads_append_args* args);

// Attention on tokens as they are stored, in latent space.
KVC_EXPORT int32_t kvc_cuda_heads_attend(const kvc_heads_pages* pages, const kvc_absorbed* absorbed);

// Decode a request's tokens.
KVC_EXPORT int32_t kvc_cuda_heads_gather(const kvc_heads_gather_args* args);
