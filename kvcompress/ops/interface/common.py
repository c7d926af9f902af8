"""What the kernels of all forms have in common.

The torch code in kvcompress/codec is the specification; byte offsets come from there as numbers. Matrices are
float32, contiguous, in the order their names say: T tokens, H KV heads, D head_dim, R kept channels of one side.
Pointers of calls whose names begin with kvc_cuda are the device's. Such a call starts work on a stream and returns 0,
the number of a CUDA error, or one of kvc_status below 0; the others are done when they return one of kvc_status.
"""

from __future__ import annotations

from kvcompress.codec.bands import MAX_OUTLIERS as MAX_OUTLIERS
from kvcompress.codec.codes.registry import widths
from kvcompress.ops.interface.struct import (
    FLOAT,
    FLOATS,
    FLOATS_OUT,
    INT32,
    INT32S,
    INT64,
    POINTER,
    Function,
    Struct,
    field,
)

ABI_VERSION = 5
"""Raised whenever a struct or the meaning of an argument changes; that of both libraries."""

DTYPES = ("float32", "bfloat16", "float16")
"""Types of the numbers that kernels read and write."""

LEVELS = ("portable", "avx2", "avx512", "avx512vnni")
"""Instruction-set levels of the CPU kernels, each faster than the one before."""

STATUS = {
    "OK": "",
    "BAD_BLOCK": "a block table, slot or ring names a block outside the cache",
    "BAD_SHAPE": "a shape the kernels do not cover",
    "BAD_LENGTH": "a request has fewer tokens than queries, or more than its row of the block table holds",
    "NO_MEMORY": "no memory for temporary arrays",
}
"""What a call returns, in this order, and what is wrong then."""

MAX_BANDS = 4
MAX_HEAD_DIM = 512
MAX_LATENT_CHANNELS = 4096

CPU_CODE_BITS = widths(lambda code: "cpu" in code.kernels and code.has_gain)
CUDA_CODE_BITS = widths(lambda code: "cuda" in code.kernels and code.has_gain)
"""Of codes that csrc/cpu/core/codes.h and csrc/cuda/core/codes.h unpack."""

CPU_FLOAT_BITS = widths(lambda code: "cpu" in code.kernels and not code.has_gain)
"""Of channels that are stored as they are, all of a side; the CUDA kernels' have 16."""


class Side(Struct):
    """Keys or values of one layer.

    Offsets are within a record; on CUDA pages within a chunk of 64 tokens. They are -1 for a part that is absent: the
    gain of 16- and 32-bit channels, outliers (halves, what the codes leave of them) and their channel numbers (bytes)
    where there are none.
    """

    _fields_ = (
        field("rank", INT32),
        field("num_bands", INT32),
        field("outliers", INT32),
        field("bits", INT32 * MAX_BANDS),
        field("widths", INT32 * MAX_BANDS),
        field("steps", FLOAT * MAX_BANDS, "quantizer step of each band in units of the channel's static scale"),
        field("gain_offset", INT64),
        field("outlier_offset", INT64),
        field("channel_offset", INT64),
        field("code_offset", INT64),
        field("code_bytes", INT64),
    )


class Rows(Struct):
    """[tokens, heads, head_dim]; strides in elements, channels contiguous."""

    _fields_ = (
        field("data", POINTER),
        field("token_stride", INT64),
        field("head_stride", INT64),
        field("dtype", INT32),
    )


class Batch(Struct):
    """Requests of a step, their queries one after the other.

    Attention is causal: of every request's last query_starts[r + 1] - query_starts[r] tokens over all its seq_lens[r]
    tokens. Where pointers are the device's, so are these numbers: a captured call can be replayed with others.
    """

    _fields_ = (
        field("query_starts", INT32S, "[num_requests + 1]"),
        field("seq_lens", INT32S, "[num_requests], a request's queries included"),
        field("block_table", INT32S, "null where records have tables of their own"),
        field("block_table_stride", INT64),
        field("num_requests", INT32),
        field("num_heads", INT32, "of queries"),
        field("softmax_scale", FLOAT),
    )


class Run(Struct):
    """Where a call runs, and how it is cut into parts."""

    _fields_ = (
        field("threads", INT32, "CPU"),
        field("level", INT32, "of instructions, kvc_level"),
        field("split_tokens", INT32, "one thread attends at a time; a positive multiple of 64, and of a block"),
        field("splits", INT32, "CUDA: of a request's tokens"),
        field("workspace", FLOATS_OUT, "splits * tokens * num_heads * (output width + 1) floats; null for one split"),
        field("num_tokens", INT64, "rows of queries; those after the last request's are padding"),
        field("max_query_len", INT32, "of any request"),
        field("stream", POINTER),
    )


class Absorbed(Struct):
    """Attention in latent space, from and to contiguous rows; CUDA."""

    _fields_ = (
        field("query_THR", FLOATS, "query times k_decode, [tokens, num_heads, k.rank]"),
        field("output_THR", FLOATS_OUT, "mixed latents, in units of the static scale, [tokens, num_heads, v.rank]"),
        field("lse_TH", FLOATS_OUT, "without the share of the keys' mean"),
        field("batch", Batch),
        field("run", Run),
    )


FUNCTIONS = (
    Function("kvc_abi_version", "void", "KVC_ABI_VERSION of the library of CPU kernels."),
    Function("kvc_best_level", "void", "The best level this machine has."),
    Function("kvc_cuda_abi_version", "void", "KVC_ABI_VERSION of the library of CUDA kernels."),
    Function("kvc_cuda_error_text", "int32_t error", "", "const char*"),
)
