"""Pages of form `heads`: a record per token and head."""

from __future__ import annotations

from kvcompress.ops.interface.common import Absorbed, Batch, Rows, Run, Side
from kvcompress.ops.interface.struct import (
    BYTES,
    FLOATS,
    FLOATS_OUT,
    INT32,
    INT32S,
    INT64,
    INT64S,
    POINTER,
    Struct,
    call,
    field,
)

CUDA_MAX_RANK = 256
CUDA_MAX_TILES = 17
"""Of 16 channels of one width: of 256 channels in bands with an odd number of eights."""

CUDA_WIDTHS = ((16, 16), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (0, 0))
"""Of keys and values, for which attention has a kernel, csrc/cuda/heads/decode_*.cu; (0, 0) takes any bands."""


class Pages(Struct):
    """uint8 [num_blocks, num_kv_heads, record]; strides in bytes. On CUDA in fragment order."""

    _fields_ = (
        field("data", BYTES),
        field("num_blocks", INT64),
        field("block_stride", INT64),
        field("head_stride", INT64),
        field("block_size", INT32),
        field("num_kv_heads", INT32),
        field("head_dim", INT32),
        field("k", Side),
        field("v", Side),
    )


class Encoder(Struct):
    """What makes latents of keys or values."""

    _fields_ = (
        field("mean_HD", FLOATS),
        field("encode_HDR", FLOATS),
        field("weight_HR", FLOATS),
    )


class AppendArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("keys", Rows),
        field("values", Rows),
        field("slots", INT64S, "of each token; below 0: skipped, and on CUDA also outside the cache"),
        field("blocks", INT64S, "CUDA, instead of slots: tokens fill these blocks one after the other"),
        field("num_tokens", INT64),
        field("k", Encoder),
        field("v", Encoder),
        field("run", Run),
    )


class AttendArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("query", Rows),
        field("output", Rows),
        field("lse_TH", FLOATS_OUT, "may be null; otherwise [tokens, num_heads] contiguous"),
        field("k_decode_HDR", FLOATS, "transposed: a query's absorption adds rows"),
        field("k_mean_HD", FLOATS),
        field("v_decode_HRD", FLOATS),
        field("v_mean_HD", FLOATS),
        field("batch", Batch),
        field("run", Run),
    )


class GatherArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("keys_THR", POINTER, "normalized latents [num_tokens, num_kv_heads, rank] contiguous"),
        field("values_THR", POINTER),
        field("dtype", INT32),
        field("block_table", INT32S, "of one request"),
        field("num_tokens", INT64),
        field("stream", POINTER),
    )


FUNCTIONS = (
    call("kvc_heads_append", "Encode tokens and store them in their slots.", AppendArgs),
    call("kvc_heads_attend", "Attention on tokens as they are stored.", AttendArgs),
    call(
        "kvc_cuda_heads_covers",
        "KVC_OK if the current device has room for what attention keeps of such pages in shared memory, else "
        "-KVC_BAD_SHAPE.",
        Pages,
    ),
    call("kvc_cuda_heads_append", "Encode tokens and store them: in their slots, or as whole blocks.", AppendArgs),
    call("kvc_cuda_heads_attend", "Attention on tokens as they are stored, in latent space.", Pages, Absorbed),
    call("kvc_cuda_heads_gather", "Decode a request's tokens.", GatherArgs),
)
