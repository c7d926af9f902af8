"""Pages of form `blocks`: a record per head and block of tokens, and rings of the newest tokens as they are."""

from __future__ import annotations

from kvcompress.ops.interface.common import Absorbed, Batch, Rows, Run
from kvcompress.ops.interface.struct import (
    BYTES,
    CONST_POINTER,
    FLOATS,
    FLOATS_OUT,
    INT32,
    INT32S,
    INT64,
    Struct,
    call,
    field,
)

MAX_LOW_RANK = 32
"""Of a block's residual."""

CUDA_MAX_RANK = 128
CUDA_MAX_LOW_RANK = 8
CUDA_MAX_HEAD_DIM = 256
CUDA_WIDTHS = ((8, 8), (4, 4), (4, 2), (2, 2))
"""Of keys and values, for which attention has a kernel."""


class Side(Struct):
    """Keys or values of one block of one head.

    Offsets are within the block's record; the parts are those of kvcompress/codec/blocks/spec.py.
    """

    _fields_ = (
        field("rank", INT32),
        field("bits", INT32),
        field("group", INT32, "values that share a scale and a zero: tokens for keys, channels for values"),
        field("low_rank", INT32),
        field("outliers", INT32),
        field("nbytes", INT32, "of all parts"),
        field("code_offset", INT64),
        field("scale_offset", INT64),
        field("zero_offset", INT64),
        field("token_offset", INT64, "factors of the low-rank residual"),
        field("channel_offset", INT64),
        field("value_offset", INT64, "outliers"),
        field("place_offset", INT64),
    )


class Pages(Struct):
    """uint8 [num_blocks, num_kv_heads, block_size / block, record_bytes]; strides in bytes."""

    _fields_ = (
        field("data", BYTES),
        field("num_blocks", INT64),
        field("block_stride", INT64),
        field("head_stride", INT64),
        field("record_bytes", INT64),
        field("block_size", INT32, "tokens per page"),
        field("block", INT32, "tokens compressed together"),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
        field("k", Side),
        field("v", Side),
    )


class Rings(Struct):
    """Newest tokens of each request, as they are: [rings, num_kv_heads, 2 (keys, values), places, head_dim].

    Strides are in elements. The token at position p is in place p % places.
    """

    _fields_ = (
        field("data", CONST_POINTER),
        field("num_rings", INT64),
        field("ring_stride", INT64),
        field("head_stride", INT64),
        field("places", INT32),
        field("dtype", INT32),
    )


class AttendArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("rings", Rings),
        field("query", Rows),
        field("keys", Rows, "of the query tokens themselves"),
        field("values", Rows),
        field("output", Rows),
        field("lse_TH", FLOATS_OUT, "as in kvc_heads_attend_args, and so are the rest"),
        field("k_decode_HDR", FLOATS),
        field("k_mean_HD", FLOATS),
        field("v_decode_HRD", FLOATS),
        field("v_mean_HD", FLOATS),
        field("ring_of", INT32S, "[num_requests]"),
        field("batch", Batch),
        field("run", Run),
    )


class NewestArgs(Struct):
    """CUDA. Keys, values and rings begin and stride in multiples of 16 bytes."""

    _fields_ = (
        field("rings", Rings),
        field("query", Rows),
        field("keys", Rows),
        field("values", Rows),
        field("output", Rows),
        field("sealed_THD", FLOATS, "mixed latents times v_decode, [tokens, num_heads, head_dim] contiguous"),
        field("sealed_lse_TH", FLOATS, "as kvc_cuda_blocks_attend writes it"),
        field("lse_TH", FLOATS_OUT, "of everything, contiguous; may be null"),
        field("k_mean_HD", FLOATS),
        field("v_mean_HD", FLOATS),
        field("ring_of", INT32S, "[num_requests]"),
        field("batch", Batch),
        field("run", Run),
        field("block", INT32),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
    )


class KeepArgs(Struct):
    """CUDA."""

    _fields_ = (
        field("rings", Rings),
        field("keys", Rows),
        field("values", Rows),
        field("ring_of", INT32S),
        field("batch", Batch),
        field("run", Run),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
    )


FUNCTIONS = (
    call(
        "kvc_blocks_attend",
        "Attention where complete blocks lie in pages. A query reads a block from its page if the block is complete by "
        "the query's own token, and every later token as it is: from the step's keys and values, or before them from "
        "the request's ring.",
        AttendArgs,
    ),
    call(
        "kvc_cuda_blocks_attend",
        "Complete blocks alone, in latent space; the output is 0 without one.",
        Pages,
        Absorbed,
    ),
    call("kvc_cuda_blocks_attend_newest", "The newest tokens, and merging with the above.", NewestArgs),
    call(
        "kvc_cuda_blocks_keep",
        "The step's tokens into their requests' rings, as many as fit: attention has read what they replace.",
        KeepArgs,
    ),
)
