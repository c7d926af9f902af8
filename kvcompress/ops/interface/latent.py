"""Pages of form `latent`: one vector per token, its first channels the latent, is the key of all heads, the latent the
value."""

from __future__ import annotations

from kvcompress.ops.interface.common import Batch, Rows, Run
from kvcompress.ops.interface.struct import INT32, INT64, INT64S, POINTER, Function, Struct, call, field


class Pages(Struct):
    """[num_blocks, block_size, channels] of numbers; strides in elements, channels contiguous.

    The CUDA kernels attend bfloat16 or float16, tokens on 16 bytes, channels a multiple of 16.
    """

    _fields_ = (
        field("data", POINTER),
        field("num_blocks", INT64),
        field("block_stride", INT64),
        field("token_stride", INT64),
        field("block_size", INT32),
        field("channels", INT32),
        field("dtype", INT32),
    )


class AppendArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("keys", Rows, "[tokens, 1, channels]; on CUDA in the pages' number format"),
        field("slots", INT64S, "below 0: skipped, and on CUDA also outside the cache"),
        field("num_tokens", INT64),
        field("run", Run),
    )


class AttendArgs(Struct):
    _fields_ = (
        field("pages", Pages),
        field("query", Rows, "[tokens, num_heads, channels], absorbed; on CUDA in the pages' format, rows on 4 bytes"),
        field("output", Rows, "[tokens, num_heads, rank]"),
        field("batch", Batch),
        field("rank", INT32, "in a workspace rounded up to 16"),
        field("run", Run),
    )


FUNCTIONS = (
    call("kvc_latent_append", "Store tokens in their slots in the pages' number format.", AppendArgs),
    call("kvc_latent_attend", "Attention whose result is in latent space.", AttendArgs),
    Function(
        "kvc_cuda_latent_most_channels",
        "int32_t* channels",
        "The most channels that attention has room for on the current device.",
    ),
    call("kvc_cuda_latent_append", "Store tokens in their slots.", AppendArgs),
    call("kvc_cuda_latent_attend", "As above; padding behind the last request is not written.", AttendArgs),
)
