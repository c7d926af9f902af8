// C interface of the CPU kernels. The torch code in kvcompress/codec is the specification; byte offsets come from
// kvcompress/codec/heads/layout.py as numbers. All matrices are float32, contiguous, in the order their names say:
// T tokens, H KV heads, D head_dim, R kept channels of one side.
#ifndef KVCOMPRESS_CPU_H
#define KVCOMPRESS_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_EXPORT __attribute__((visibility("default")))

// Raised whenever a struct below or the meaning of an argument changes.
#define KVC_ABI_VERSION 4

#define KVC_MAX_BANDS 4
#define KVC_MAX_OUTLIERS 2

enum kvc_dtype { KVC_FLOAT32 = 0, KVC_BFLOAT16 = 1, KVC_FLOAT16 = 2 };

enum kvc_level { KVC_PORTABLE = 0, KVC_AVX2 = 1, KVC_AVX512 = 2, KVC_AVX512_VNNI = 3 };

enum kvc_status {
    KVC_OK = 0,
    KVC_BAD_BLOCK = 1,   // a block table or slot names a block outside the cache
    KVC_BAD_SHAPE = 2,   // a shape the kernels do not cover
    KVC_BAD_LENGTH = 3,  // a request has fewer tokens than queries
    KVC_NO_MEMORY = 4,
};

// Keys or values of one layer. Offsets within a record; -1 for a part that is absent: the gain of 16- and 32-bit
// channels, outliers (halves, what the codes leave of them) and their channel numbers (bytes) where there are none.
typedef struct {
    int32_t rank;
    int32_t num_bands;
    int32_t outliers;
    int32_t bits[KVC_MAX_BANDS];
    int32_t widths[KVC_MAX_BANDS];
    float steps[KVC_MAX_BANDS];  // quantizer step of each band in units of the channel's static scale
    int64_t gain_offset;
    int64_t outlier_offset;
    int64_t channel_offset;
    int64_t code_offset;
    int64_t code_bytes;
} kvc_side;

// uint8 [num_blocks, num_kv_heads, record]; strides in bytes.
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
} kvc_pages;

// [tokens, heads, head_dim]; strides in elements, channels contiguous.
typedef struct {
    void* data;
    int64_t token_stride;
    int64_t head_stride;
    int32_t dtype;
} kvc_rows;

typedef struct {
    kvc_pages pages;
    kvc_rows query;
    kvc_rows output;
    float* lse_TH;             // may be null; otherwise [tokens, num_heads] contiguous
    const float* k_decode_HDR; // transposed: a query's absorption adds rows
    const float* k_mean_HD;
    const float* v_decode_HRD;
    const float* v_mean_HD;
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts; // [num_requests + 1]
    const int32_t* seq_lens;     // [num_requests]
    int32_t num_requests;
    int32_t num_heads;
    float softmax_scale;
    int32_t split_tokens; // tokens one thread attends at a time; a positive multiple of 64
    int32_t threads;
    int32_t level;
} kvc_attend_args;

typedef struct {
    kvc_pages pages;
    kvc_rows keys;
    kvc_rows values;
    const int64_t* slots; // below 0: skip
    int64_t num_tokens;
    const float *k_mean_HD, *k_encode_HDR, *k_weight_HR;
    const float *v_mean_HD, *v_encode_HDR, *v_weight_HR;
    int32_t threads;
    int32_t level;
} kvc_append_args;

// ---- blocks (kvcompress/codec/blocks/codec.py) -------------------------------------------------------------------------------

// Keys or values of one block of one head. Offsets within the block's record; the parts are those of codec/blocks/spec.py.
typedef struct {
    int32_t rank;
    int32_t bits;
    int32_t group;     // values that share a scale and a zero: tokens for keys, channels for values
    int32_t low_rank;
    int32_t outliers;
    int32_t nbytes;    // of all parts
    int64_t code_offset;
    int64_t scale_offset;
    int64_t zero_offset;
    int64_t token_offset;    // factors of the low-rank residual
    int64_t channel_offset;
    int64_t value_offset;    // outliers
    int64_t place_offset;
} kvc_block_side;

// uint8 [num_blocks, num_kv_heads, block_size / block, record_bytes]; strides in bytes.
typedef struct {
    uint8_t* data;
    int64_t num_blocks;
    int64_t block_stride;
    int64_t head_stride;
    int64_t record_bytes;
    int32_t block_size;  // tokens per page
    int32_t block;       // tokens compressed together
    int32_t num_kv_heads;
    int32_t head_dim;
    kvc_block_side k;
    kvc_block_side v;
} kvc_block_pages;

// Newest tokens of each request, as they are: [rings, num_kv_heads, 2 (keys, values), places, head_dim]; strides in
// elements. The token at position p is in place p % places.
typedef struct {
    const void* data;
    int64_t num_rings;
    int64_t ring_stride;
    int64_t head_stride;
    int32_t places;
    int32_t dtype;
} kvc_rings;

typedef struct {
    kvc_block_pages pages;
    kvc_rings rings;
    kvc_rows query;
    kvc_rows keys;    // of the query tokens themselves
    kvc_rows values;
    kvc_rows output;
    float* lse_TH;             // as in kvc_attend_args, and so are the rest
    const float* k_decode_HDR;
    const float* k_mean_HD;
    const float* v_decode_HRD;
    const float* v_mean_HD;
    const int32_t* ring_of;    // [num_requests]
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    int32_t num_requests;
    int32_t num_heads;
    float softmax_scale;
    int32_t split_tokens; // a positive multiple of the block
    int32_t threads;
    int32_t level;
} kvc_block_attend_args;

// ---- MLA: one vector per token, its first channels the latent, is the key of all heads; the latent is the value ----

// [num_blocks, block_size, channels] of numbers; strides in elements, channels contiguous.
typedef struct {
    void* data;
    int64_t num_blocks;
    int64_t block_stride;
    int64_t token_stride;
    int32_t block_size;
    int32_t channels;
    int32_t dtype;
} kvc_latent_pages;

typedef struct {
    kvc_latent_pages pages;
    kvc_rows query;  // [tokens, num_heads, channels], absorbed
    kvc_rows output; // [tokens, num_heads, rank]
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* query_starts; // [num_requests + 1]
    const int32_t* seq_lens;     // [num_requests]
    int32_t num_requests;
    int32_t num_heads;
    int32_t rank;
    float softmax_scale;
    int32_t split_tokens;
    int32_t threads;
    int32_t level;
} kvc_latent_attend_args;

typedef struct {
    kvc_latent_pages pages;
    kvc_rows keys; // [tokens, 1, channels]
    const int64_t* slots;
    int64_t num_tokens;
    int32_t level;
} kvc_latent_append_args;

// ---- Layers that share a latent (kvcompress/codec/shared/codec.py) -------------------------------------------------------

// One side's records in the pages of one layer: uint8 [num_blocks][records][block_size][token_bytes]. The side's offsets
// are within a token's bytes.
typedef struct {
    uint8_t* data; // the first page's first record
    int64_t num_blocks;
    int64_t block_stride;
    int32_t block_size;
    int32_t records;
    int32_t token_bytes;
    kvc_side side;
    const int32_t* block_table; // attention only
    int64_t block_table_stride;
} kvc_records;

// Keys that the group shares: num_stripes records of one layer each, and the rotation. Keys of the layer's own: one
// kvc_records with a record per KV head, and no decode_blocked.
typedef struct {
    const kvc_records* k;
    const kvc_records* v; // num_stripes
    int32_t num_k;
    int32_t num_stripes;
    kvc_rows query;
    kvc_rows output;
    kvc_rows keys; // the step's own tokens as they are: [tokens, num_kv_heads, head_dim], after RoPE
    kvc_rows values;
    const float* k_mean_HD;
    const float* k_decode_HDR;     // keys of the layer's own
    const float* k_decode_blocked; // shared keys: see kvcompress/ops/shared/plan.py
    const int16_t* k_codes_blocked;
    const float* k_scale_HD;       // of k_codes_blocked
    const float* v_decode_HRD;
    const float* v_mean_HD;
    const float* rope_frequency_F;
    float rope_amplitude;
    const int32_t* query_starts;
    const int32_t* seq_lens;
    const int32_t* stored_lens;  // [num_requests]: tokens attended as stored; those after them are rows of the step
    const int32_t* exact_rows;   // the row of each of these, request after request
    const int32_t* exact_starts; // [num_requests]: where a request's begin in exact_rows
    int32_t num_requests;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    float softmax_scale;
    int32_t split_tokens;
    int32_t threads;
    int32_t level;
} kvc_shared_attend_args;

typedef struct {
    kvc_records records;
    kvc_rows latents; // float32 [tokens, records, rank], normalized
    const float* weight_HR;
    const int64_t* slots;
    int64_t num_tokens;
    int32_t threads;
    int32_t level;
} kvc_store_args;

KVC_EXPORT int32_t kvc_abi_version(void);

// sizeof(kvc_attend_args), sizeof(kvc_append_args), and so on: see schedule.cpp.
KVC_EXPORT void kvc_struct_sizes(int64_t sizes[7]);

// The best level this machine has.
KVC_EXPORT int32_t kvc_best_level(void);

// Causal attention of every request's last query_starts[r+1] - query_starts[r] tokens over all its seq_lens[r] tokens.
KVC_EXPORT int32_t kvc_attend(const kvc_attend_args* args);

// The same where complete blocks lie in pages. A query reads a block from its page if the block is complete by the query's
// own token, and every later token as it is: from the step's keys and values, or before them from the request's ring.
KVC_EXPORT int32_t kvc_attend_blocks(const kvc_block_attend_args* args);

// Encode tokens and store them in their slots.
KVC_EXPORT int32_t kvc_append(const kvc_append_args* args);

// As kvc_attend, for latents; the result is in latent space.
KVC_EXPORT int32_t kvc_latent_attend(const kvc_latent_attend_args* args);

// Store tokens in their slots in the pages' number format.
KVC_EXPORT int32_t kvc_latent_append(const kvc_latent_append_args* args);

// As kvc_attend, for one layer of a group. The step's records must have been stored where keys are the layer's own.
KVC_EXPORT int32_t kvc_shared_attend(const kvc_shared_attend_args* args);

// Encode latents and store them as records.
KVC_EXPORT int32_t kvc_store(const kvc_store_args* args);

#ifdef __cplusplus
}
#endif

#endif
