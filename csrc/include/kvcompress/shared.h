// Written by kvcompress/ops/interface/header.py.
//
// Records of form `shared`: stripes of a latent that layers share, and keys of a layer's own heads.
#pragma once

#include "kvcompress/common.h"

#define KVC_SHARED_CUDA_MAX_STRIPES 32
#define KVC_SHARED_CUDA_MAX_TILES 64

// One side's records in the pages of one layer: uint8 [num_blocks][records][block_size][token_bytes].
// The side's offsets are within a token's bytes.
typedef struct {
    uint8_t* data;  // the first page's first record
    int64_t num_blocks;
    int64_t block_stride;
    int32_t block_size;
    int32_t records;
    int32_t token_bytes;
    kvc_side side;
    const int32_t* block_table;  // attention only
    int64_t block_table_stride;
} kvc_shared_records;
static_assert(sizeof(kvc_shared_records) == 160);

// The running step's tokens, those of them attended as they are.
typedef struct {
    kvc_rows keys;  // [tokens, num_kv_heads, head_dim], after RoPE
    kvc_rows values;
    const int32_t* stored_lens;  // [num_requests]: tokens attended as stored; those after them are rows
    const int32_t* rows;  // the row of each of these, request after request; on CUDA -1: as it is stored after all
    const int32_t* starts;  // [num_requests]: where a request's begin in rows
} kvc_shared_exact;
static_assert(sizeof(kvc_shared_exact) == 88);

// Keys that the group shares: num_stripes records of one layer each, and the rotation. Keys of the layer's own: one
// kvc_shared_records with a record per KV head, and no decode_blocked.
typedef struct {
    const kvc_shared_records* k;
    const kvc_shared_records* v;  // num_stripes
    int32_t num_k;
    int32_t num_stripes;
    kvc_rows query;
    kvc_rows output;
    kvc_shared_exact exact;
    const float* k_mean_HD;
    const float* k_decode_HDR;  // keys of the layer's own
    const float* k_decode_blocked;  // shared keys: see kvcompress/ops/shared/plan.py
    const int16_t* k_codes_blocked;
    const float* k_scale_HD;  // of k_codes_blocked
    const float* v_decode_HRD;
    const float* v_mean_HD;
    const float* rope_frequency_F;
    float rope_amplitude;
    kvc_batch batch;
    int32_t num_kv_heads;
    int32_t head_dim;
    kvc_run run;
} kvc_shared_attend_args;
static_assert(sizeof(kvc_shared_attend_args) == 352);

// One record per stripe for keys, or one with a record per KV head.
typedef struct {
    const kvc_shared_records* k;
    const kvc_shared_records* v;  // num_stripes
    int32_t num_k;
    int32_t num_stripes;
    kvc_rows query;  // shared keys: after RoPE; own: [tokens, num_heads, k_channels], absorbed, float32
    kvc_shared_exact exact;
    int32_t k_channels;  // own keys: 16 per tile; shared keys: 64, 128 or 256, head_dim and padding
    const void* k_decode;  // halves, in the order of csrc/cuda/shared/scores.h; null: keys are own
    const float* k_decode_unit;  // [num_kv_heads]
    const float* k_mean;  // [num_kv_heads, k_channels]
    const float* rope_frequency;  // [k_channels / 2]
    const float* rope_amplitude;  // [1]
    float* scores;  // [requests_at_once, max_query_len, num_heads, score_stride]
    int64_t score_stride;  // tokens of the longest request, or more: a multiple of 64
    float* mixed_THR;  // of stored tokens: latents of values, [tokens, num_heads, stripes * v.rank]
    float* mixed_lse_TH;
    float* exact_THD;  // of the step's own tokens: [tokens, num_heads, head_dim]
    float* exact_lse_TH;
    kvc_batch batch;
    int32_t requests_at_once;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t score_splits;  // of a request's tokens; run.splits are of those that values are mixed from
    kvc_run run;
} kvc_shared_cuda_attend_args;
static_assert(sizeof(kvc_shared_cuda_attend_args) == 352);

typedef struct {
    kvc_shared_records records;
    kvc_rows latents;  // float32 [tokens, records, rank], normalized
    const float* weight_HR;
    const int64_t* slots;  // below 0: skipped, and on CUDA also outside the cache
    int64_t num_tokens;
    kvc_run run;
} kvc_shared_store_args;
static_assert(sizeof(kvc_shared_store_args) == 264);

// Attention of one layer of a group. The step's records must have been stored where keys are the layer's own.
KVC_EXPORT int32_t kvc_shared_attend(const kvc_shared_attend_args* args);

// Encode latents and store them as records.
KVC_EXPORT int32_t kvc_shared_store(const kvc_shared_store_args* args);

// Attention in two parts, each with the log of its sum of exponentials: stored tokens, whose values are still latents,
// and tokens of the step as they are.
KVC_EXPORT int32_t kvc_cuda_shared_attend(const kvc_shared_cuda_attend_args* args);

// Encode latents and store them as records.
KVC_EXPORT int32_t kvc_cuda_shared_store(const kvc_shared_store_args* args);
