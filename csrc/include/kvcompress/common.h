// Written by kvcompress/ops/interface/header.py.
//
// What the kernels of all forms have in common.
// The torch code in kvcompress/codec is the specification; byte offsets come from there as numbers. Matrices are
// float32, contiguous, in the order their names say: T tokens, H KV heads, D head_dim, R kept channels of one side.
// Pointers of calls whose names begin with kvc_cuda are the device's. Such a call starts work on a stream and returns
// 0, the number of a CUDA error, or one of kvc_status below 0; the others are done when they return one of kvc_status.
#pragma once

#include <stdint.h>

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))

#define KVC_MAX_OUTLIERS 2
#define KVC_ABI_VERSION 5
#define KVC_MAX_BANDS 4
#define KVC_MAX_HEAD_DIM 512
#define KVC_MAX_LATENT_CHANNELS 4096
#define KVC_CPU_CODE_BITS(X) X(8) X(4) X(2)
#define KVC_CUDA_CODE_BITS(X) X(8) X(4) X(2)
#define KVC_CPU_FLOAT_BITS(X) X(32) X(16)

enum kvc_dtype { KVC_FLOAT32 = 0, KVC_BFLOAT16 = 1, KVC_FLOAT16 = 2 };
enum kvc_level { KVC_PORTABLE = 0, KVC_AVX2 = 1, KVC_AVX512 = 2, KVC_AVX512VNNI = 3 };
enum kvc_status { KVC_OK = 0, KVC_BAD_BLOCK = 1, KVC_BAD_SHAPE = 2, KVC_BAD_LENGTH = 3, KVC_NO_MEMORY = 4 };

// Keys or values of one layer.
// Offsets are within a record; on CUDA pages within a chunk of 64 tokens. They are -1 for a part that is absent: the
// gain of 16- and 32-bit channels, outliers (halves, what the codes leave of them) and their channel numbers (bytes)
// where there are none.
typedef struct {
    int32_t rank;
    int32_t num_bands;
    int32_t outliers;
    int32_t bits[4];
    int32_t widths[4];
    float steps[4];  // quantizer step of each band in units of the channel's static scale
    int64_t gain_offset;
    int64_t outlier_offset;
    int64_t channel_offset;
    int64_t code_offset;
    int64_t code_bytes;
} kvc_side;
static_assert(sizeof(kvc_side) == 104);

// [tokens, heads, head_dim]; strides in elements, channels contiguous.
typedef struct {
    void* data;
    int64_t token_stride;
    int64_t head_stride;
    int32_t dtype;
} kvc_rows;
static_assert(sizeof(kvc_rows) == 32);

// Requests of a step, their queries one after the other.
// Attention is causal: of every request's last query_starts[r + 1] - query_starts[r] tokens over all its seq_lens[r]
// tokens. Where pointers are the device's, so are these numbers: a captured call can be replayed with others.
typedef struct {
    const int32_t* query_starts;  // [num_requests + 1]
    const int32_t* seq_lens;  // [num_requests], a request's queries included
    const int32_t* block_table;  // null where records have tables of their own
    int64_t block_table_stride;
    int32_t num_requests;
    int32_t num_heads;  // of queries
    float softmax_scale;
} kvc_batch;
static_assert(sizeof(kvc_batch) == 48);

// Where a call runs, and how it is cut into parts.
typedef struct {
    int32_t threads;  // CPU
    int32_t level;  // of instructions, kvc_level
    int32_t split_tokens;  // one thread attends at a time; a positive multiple of 64, and of a block
    int32_t splits;  // CUDA: of a request's tokens
    float* workspace;  // splits * tokens * num_heads * (output width + 1) floats; null for one split
    int64_t num_tokens;  // rows of queries; those after the last request's are padding
    int32_t max_query_len;  // of any request
    void* stream;
} kvc_run;
static_assert(sizeof(kvc_run) == 48);

// Attention in latent space, from and to contiguous rows; CUDA.
typedef struct {
    const float* query_THR;  // query times k_decode, [tokens, num_heads, k.rank]
    float* output_THR;  // mixed latents, in units of the static scale, [tokens, num_heads, v.rank]
    float* lse_TH;  // without the share of the keys' mean
    kvc_batch batch;
    kvc_run run;
} kvc_absorbed;
static_assert(sizeof(kvc_absorbed) == 120);

// KVC_ABI_VERSION of the library of CPU kernels.
KVC_EXPORT int32_t kvc_abi_version(void);

// The best level this machine has.
KVC_EXPORT int32_t kvc_best_level(void);

// KVC_ABI_VERSION of the library of CUDA kernels.
KVC_EXPORT int32_t kvc_cuda_abi_version(void);

KVC_EXPORT const char* kvc_cuda_error_text(int32_t error);
