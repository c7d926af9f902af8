// Written by kvcompress/ops/interface/header.py.
//
// Pages of form `blocks`: a record per head and block of tokens, and rings of the newest tokens as they are.
#pragma once

#include "kvcompress/common.h"

#define KVC_BLOCKS_MAX_LOW_RANK 32
#define KVC_BLOCKS_CUDA_MAX_RANK 128
#define KVC_BLOCKS_CUDA_MAX_LOW_RANK 8
#define KVC_BLOCKS_CUDA_MAX_HEAD_DIM 256
#define KVC_BLOCKS_CUDA_WIDTHS(X) X(8, 8) X(4, 4) X(4, 2) X(2, 2)

// Keys or values of one block of one head.
// Offsets are within the block's record; the parts are those of kvcompress/codec/blocks/spec.py.
typedef struct {
    int32_t rank;
    int32_t bits;
    int32_t group;  // values that share a scale and a zero: tokens for keys, channels for values
    int32_t low_rank;
    int32_t outliers;
    int32_t nbytes;  // of all parts
    int64_t code_offset;
    int64_t scale_offset;
    int64_t zero_offset;
    int64_t token_offset;  // factors of the low-rank residual
    int64_t channel_offset;
    int64_t value_offset;  // outliers
    int64_t place_offset;
} kvc_blocks_side;
static_assert(sizeof(kvc_blocks_side) == 80);

// uint8 [num_blocks, num_kv_heads, block_size / block, record_bytes]; strides in bytes.
typedef struct {
    uint8_t* data;
    int64_t num_blocks;
    int64_t block_stride;
    int64_t head_stride;
    int64_t record_bytes;
    int32_t block_size;  // tokens per page
    int32_t block;  // tokens compressed together
    int32_t num_kv_heads;
    int32_t head_dim;
    kvc_blocks_side k;
    kvc_blocks_side v;
} kvc_blocks_pages;
static_assert(sizeof(kvc_blocks_pages) == 216);

// Newest tokens of each request, as they are: [rings, num_kv_heads, 2 (keys, values), places, head_dim].
// Strides are in elements. The token at position p is in place p % places.
typedef struct {
    const void* data;
    int64_t num_rings;
    int64_t ring_stride;
    int64_t head_stride;
    int32_t places;
    int32_t dtype;
} kvc_blocks_rings;
static_assert(sizeof(kvc_blocks_rings) == 40);

typedef struct {
    kvc_blocks_pages pages;
    kvc_blocks_rings rings;
    kvc_rows query;
    kvc_rows keys;  // of the query tokens themselves
    kvc_rows values;
    kvc_rows output;
    float* lse_TH;  // as in kvc_heads_attend_args, and so are the rest
    const float* k_decode_HDR;
    const float* k_mean_HD;
    const float* v_decode_HRD;
    const float* v_mean_HD;
    const int32_t* ring_of;  // [num_requests]
    kvc_batch batch;
    kvc_run run;
} kvc_blocks_attend_args;
static_assert(sizeof(kvc_blocks_attend_args) == 528);

// CUDA. Keys, values and rings begin and stride in multiples of 16 bytes.
typedef struct {
    kvc_blocks_rings rings;
    kvc_rows query;
    kvc_rows keys;
    kvc_rows values;
    kvc_rows output;
    const float* sealed_THD;  // mixed latents times v_decode, [tokens, num_heads, head_dim] contiguous
    const float* sealed_lse_TH;  // as kvc_cuda_blocks_attend writes it
    float* lse_TH;  // of everything, contiguous; may be null
    const float* k_mean_HD;
    const float* v_mean_HD;
    const int32_t* ring_of;  // [num_requests]
    kvc_batch batch;
    kvc_run run;
    int32_t block;
    int32_t num_kv_heads;
    int32_t head_dim;
} kvc_blocks_newest_args;
static_assert(sizeof(kvc_blocks_newest_args) == 328);

// CUDA.
typedef struct {
    kvc_blocks_rings rings;
    kvc_rows keys;
    kvc_rows values;
    const int32_t* ring_of;
    kvc_batch batch;
    kvc_run run;
    int32_t num_kv_heads;
    int32_t head_dim;
} kvc_blocks_keep_args;
static_assert(sizeof(kvc_blocks_keep_args) == 216);

// Attention where complete blocks lie in pages. A query reads a block from its page if the block is complete by the
// query's own token, and every later token as it is: from the step's keys and values, or before them from the request's
// ring.
KVC_EXPORT int32_t kvc_blocks_attend(const kvc_blocks_attend_args* args);

// Complete blocks alone, in latent space; the output is 0 without one.
KVC_EXPORT int32_t kvc_cuda_blocks_attend(const kvc_blocks_pages* pages, const kvc_absorbed* absorbed);

// The newest tokens, and merging with the above.
KVC_EXPORT int32_t kvc_cuda_blocks_attend_newest(const kvc_blocks_newest_args* args);

// The step's tokens into their requests' rings, as many as fit: attention has read what they replace.
KVC_EXPORT int32_t kvc_cuda_blocks_keep(const kvc_blocks_keep_args* args);
