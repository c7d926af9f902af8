"""What the CUDA kernels of all forms have in common: the library, the device's size, and how work is cut for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.codec.layout import CHUNK_TOKENS
from kvcompress.ops import cuda_library
from kvcompress.ops.call import Call
from kvcompress.ops.interface.common import Absorbed, Run
from kvcompress.ops.interface.struct import Struct

ROWS = 8
"""Query rows of one block of threads."""

MOST_QUERIES = 64
"""Queries of a request that the attention kernel takes at a time: it reads the cache once for every eight rows."""

_WARPS = 4


def kernels(device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernels, for memory of a GPU where they are installed."""
    return cuda_library.load() if device.type == "cuda" else None


def choose_splits(blocks: int, context: int, multiprocessors: int) -> int:
    """Parts of each request, so that twice as many blocks of threads run as fit at a time, two on a multiprocessor.

    A part gives every warp at least two chunks, because parts are merged at a cost of their own.
    """
    wanted = -(-4 * multiprocessors // blocks)
    most = context // (2 * _WARPS * CHUNK_TOKENS)
    return max(1, min(wanted, most))


def attend_latents(
    kernels: ctypes.CDLL,
    attend: Callable[..., int],
    pages: Struct,
    call: Call,
    absorbed_THR: Tensor,
    shape: tuple[int, int, int],
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """Absorbed queries to mixed latents of values `[tokens, query heads, rank]` and lse, by one of the kernels.

    Args:
        attend: the kernel.
        pages: as it takes them.
        shape: KV heads, tokens per block, and rank of the values' latents.
        splits: parts a request's tokens are cut into; chosen from shapes alone if not given.
    """
    (kv_heads, block_size, rank), (tokens, heads, _) = shape, absorbed_THR.shape
    device, batch = absorbed_THR.device, call.batch(absorbed_THR.device)
    # Zeros, because padding behind the last request is not written.
    mixed_THR, lse_TH = absorbed_THR.new_zeros(tokens, heads, rank), absorbed_THR.new_zeros(tokens, heads)
    if not tokens or not batch.num_requests:
        return mixed_THR, lse_TH
    if splits is None:
        blocks = batch.num_requests * kv_heads * -(-call.most_queries * heads // (kv_heads * ROWS))
        splits = choose_splits(blocks, call.block_table_RN.shape[1] * block_size, multiprocessors(device))
    parts = run(device, tokens, heads, call.most_queries, splits, rank)
    args = Absorbed(absorbed_THR, mixed_THR, lse_TH, batch, parts)
    cuda_library.check(kernels, attend(ctypes.byref(pages), ctypes.byref(args)))
    return mixed_THR, lse_TH


def run(
    device: torch.device, tokens: int, num_heads: int = 1, max_query_len: int = 1, splits: int = 1, width: int = 0
) -> Run:
    """How a call runs: on torch's current stream of the device, with room for what splits leave to be merged.

    Args:
        width: numbers that a split leaves of a row, beside their weight.
    """
    workspace = None
    if splits > 1:
        workspace = torch.empty(splits * tokens * num_heads * (width + 1), dtype=torch.float32, device=device)
    numbers = {"num_tokens": tokens, "max_query_len": max_query_len, "splits": splits}
    return Run(stream=stream(device), workspace=workspace, **numbers)


def workspace_bytes(head_dim: int, k_rank: int, v_rank: int, tokens: int, num_heads: int, device: torch.device) -> int:
    """Bytes that attention on absorbed latents takes at most beside its arguments, in steps of so many tokens."""
    # Queries in float32 and the output, before and after its mean; absorbed queries and mixed latents, once more in the
    # order that a product wants; splits, of which there are no more than rows keep the device busy (`choose_splits`).
    row = 3 * head_dim + 2 * k_rank + 2 * v_rank + 2
    splits = 4 * multiprocessors(device) * ROWS * (v_rank + 1)
    return (tokens * num_heads * row + splits) * torch.float32.itemsize


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where kernels are emulated, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def stream(device: torch.device) -> int:
    """Torch's current one on the device, as the C interface takes it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
