"""What the CUDA kernels of all forms have in common: the library, the device's size, and how work is cut for it."""

from __future__ import annotations

import ctypes
import functools

import torch

from kvcompress.codec.heads.layout import CHUNK_TOKENS
from kvcompress.ops import cuda_library

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
