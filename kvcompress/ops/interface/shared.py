"""Records of form `shared`: stripes of a latent that layers share, and keys of a layer's own heads."""

from __future__ import annotations

from kvcompress.ops.interface.common import Batch, Rows, Run, Side
from kvcompress.ops.interface.struct import (
    BYTES,
    CONST_POINTER,
    FLOAT,
    FLOATS,
    FLOATS_OUT,
    INT16S,
    INT32,
    INT32S,
    INT64,
    INT64S,
    Struct,
    call,
    field,
    pointer_to,
)

CUDA_MAX_STRIPES = 32
CUDA_MAX_TILES = 64
"""Of 16 channels of one width, of a record."""


class Records(Struct):
    """One side's records in the pages of one layer: uint8 [num_blocks][records][block_size][token_bytes].

    The side's offsets are within a token's bytes.
    """

    _fields_ = (
        field("data", BYTES, "the first page's first record"),
        field("num_blocks", INT64),
        field("block_stride", INT64),
        field("block_size", INT32),
        field("records", INT32),
        field("token_bytes", INT32),
        field("side", Side),
        field("block_table", INT32S, "attention only"),
        field("block_table_stride", INT64),
    )


class Exact(Struct):
    """The running step's tokens, those of them attended as they are."""

    _fields_ = (
        field("keys", Rows, "[tokens, num_kv_heads, head_dim], after RoPE"),
        field("values", Rows),
        field("stored_lens", INT32S, "[num_requests]: tokens attended as stored; those after them are rows"),
        field("rows", INT32S, "the row of each of these, request after request; on CUDA -1: as it is stored after all"),
        field("starts", INT32S, "[num_requests]: where a request's begin in rows"),
    )


class AttendArgs(Struct):
    """Keys that the group shares: num_stripes records of one layer each, and the rotation. Keys of the layer's own: one
    kvc_shared_records with a record per KV head, and no decode_blocked."""

    _fields_ = (
        field("k", pointer_to(Records)),
        field("v", pointer_to(Records), "num_stripes"),
        field("num_k", INT32),
        field("num_stripes", INT32),
        field("query", Rows),
        field("output", Rows),
        field("exact", Exact),
        field("k_mean_HD", FLOATS),
        field("k_decode_HDR", FLOATS, "keys of the layer's own"),
        field("k_decode_blocked", FLOATS, "shared keys: see kvcompress/ops/shared/plan.py"),
        field("k_codes_blocked", INT16S),
        field("k_scale_HD", FLOATS, "of k_codes_blocked"),
        field("v_decode_HRD", FLOATS),
        field("v_mean_HD", FLOATS),
        field("rope_frequency_F", FLOATS),
        field("rope_amplitude", FLOAT),
        field("batch", Batch),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
        field("run", Run),
    )


class CudaAttendArgs(Struct):
    """One record per stripe for keys, or one with a record per KV head."""

    _fields_ = (
        field("k", pointer_to(Records)),
        field("v", pointer_to(Records), "num_stripes"),
        field("num_k", INT32),
        field("num_stripes", INT32),
        field("query", Rows, "shared keys: after RoPE; own: [tokens, num_heads, k_channels], absorbed, float32"),
        field("exact", Exact),
        field("k_channels", INT32, "own keys: 16 per tile; shared keys: 64, 128 or 256, head_dim and padding"),
        field("k_decode", CONST_POINTER, "halves, in the order of csrc/cuda/shared/scores.h; null: keys are own"),
        field("k_decode_unit", FLOATS, "[num_kv_heads]"),
        field("k_mean", FLOATS, "[num_kv_heads, k_channels]"),
        field("rope_frequency", FLOATS, "[k_channels / 2]"),
        field("rope_amplitude", FLOATS, "[1]"),
        field("scores", FLOATS_OUT, "[requests_at_once, max_query_len, num_heads, score_stride]"),
        field("score_stride", INT64, "tokens of the longest request, or more: a multiple of 64"),
        field("mixed_THR", FLOATS_OUT, "of stored tokens: latents of values, [tokens, num_heads, stripes * v.rank]"),
        field("mixed_lse_TH", FLOATS_OUT),
        field("exact_THD", FLOATS_OUT, "of the step's own tokens: [tokens, num_heads, head_dim]"),
        field("exact_lse_TH", FLOATS_OUT),
        field("batch", Batch),
        field("requests_at_once", INT32),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
        field("score_splits", INT32, "of a request's tokens; run.splits are of those that values are mixed from"),
        field("run", Run),
    )


class StoreArgs(Struct):
    _fields_ = (
        field("records", Records),
        field("latents", Rows, "float32 [tokens, records, rank], normalized"),
        field("weight_HR", FLOATS),
        field("slots", INT64S, "below 0: skipped, and on CUDA also outside the cache"),
        field("num_tokens", INT64),
        field("run", Run),
    )


FUNCTIONS = (
    call(
        "kvc_shared_attend",
        "Attention of one layer of a group. The step's records must have been stored where keys are the layer's own.",
        AttendArgs,
    ),
    call("kvc_shared_store", "Encode latents and store them as records.", StoreArgs),
    call(
        "kvc_cuda_shared_attend",
        "Attention in two parts, each with the log of its sum of exponentials: stored tokens, whose values are still "
        "latents, and tokens of the step as they are.",
        CudaAttendArgs,
    ),
    call("kvc_cuda_shared_store", "Encode latents and store them as records.", StoreArgs),
)
