"""The CUDA kernels on pages of form `latent`. Nothing here waits for the device or reads from it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.call import Call
from kvcompress.ops.interface.latent import AppendArgs, AttendArgs
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.rows import rows_struct

LEAST_TOKENS = 128
"""A split has at least as many; the kernels see to it (csrc/cuda/latent/args.h)."""

SPLIT_COST = 256
"""Tokens in whose time a split begins and is merged, estimated from the bytes of both."""

FEW_ROWS = 16
"""Query rows of a request up to which two blocks of threads fit on a multiprocessor."""


def covers(library: ctypes.CDLL, channels: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for such latents."""
    sixteen_bits = dtype in (torch.bfloat16, torch.float16)
    return sixteen_bits and channels % 16 == 0 and channels <= most_channels(library)


@functools.cache
def most_channels(library: ctypes.CDLL) -> int:
    """What a multiprocessor's shared memory has room for: 2272 channels on an H100 or H200, 1584 on an A100."""
    found = ctypes.c_int32()
    cuda_library.check(library, library.kvc_cuda_latent_most_channels(ctypes.byref(found)))
    return found.value


class CudaLatent(LatentOp):
    """Storing and attending by kernels: tensor cores take 16-bit numbers, copies 16 bytes."""

    on_kernels = True

    def __init__(self, kernels: ctypes.CDLL, device: torch.device) -> None:
        self._kernels, self._device = kernels, device

    def append(self, pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
        """A slot outside the cache is skipped: refusing it would mean waiting."""
        assert key_TC.shape[0] == slots_T.shape[0]
        assert (key_TC.dtype, key_TC.shape[1]) == (pages_NSC.dtype, pages_NSC.shape[2])
        slots_T = slots_T.to(torch.int64).contiguous()
        args = AppendArgs(
            pages=latent_pages_struct(pages_NSC),
            keys=rows_struct(key_TC[:, None]),
            slots=slots_T,
            num_tokens=slots_T.shape[0],
            run=gpu.run(pages_NSC.device, slots_T.shape[0]),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_latent_append(ctypes.byref(args)))

    def attend(self, call: Call, pages_NSC: Tensor, splits: int | None = None) -> None:
        """Everything is brought to the device.

        Args:
            splits: parts a request's tokens are cut into; chosen from shapes alone if not given.
        """
        assert pages_NSC.data_ptr() % 16 == 0
        assert pages_NSC.stride(0) % 8 == pages_NSC.stride(1) % 8 == 0
        query_THC, output_THR = call.query_THD, call.output_THD
        if query_THC.data_ptr() % 4 or query_THC.stride(0) % 2 or query_THC.stride(1) % 2:
            query_THC = query_THC.clone(memory_format=torch.contiguous_format)
        batch, max_query_len = call.batch(query_THC.device), call.most_queries
        tokens, heads, rank = output_THR.shape
        if not tokens or not batch.num_requests:
            return
        if splits is None:
            context, multiprocessors = (
                call.block_table_RN.shape[1] * pages_NSC.shape[1],
                gpu.multiprocessors(self._device),
            )
            splits = choose_splits(batch.num_requests, max_query_len * heads, context, multiprocessors)
        args = AttendArgs(
            pages=latent_pages_struct(pages_NSC),
            query=rows_struct(query_THC),
            output=rows_struct(output_THR),
            batch=batch,
            rank=rank,
            run=gpu.run(self._device, tokens, heads, max_query_len, splits, _padded(rank)),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_latent_attend(ctypes.byref(args)))

    def workspace_bytes(self, tokens: int, num_heads: int, rank: int, longest: int) -> int:
        return _workspace_bytes(tokens, num_heads, rank, longest, self._device)


@functools.cache
def _workspace_bytes(tokens: int, heads: int, rank: int, longest: int, device: torch.device) -> int:
    """Bytes that `attend` takes at most beside its arguments, in steps of so many query tokens.

    Of one request, or of one each of up to a thousand requests: between the two there are more rows and fewer splits.
    """
    multiprocessors = gpu.multiprocessors(device)
    prompts = (
        (queries, choose_splits(1, queries * heads, longest, multiprocessors)) for queries in range(1, tokens + 1, 8)
    )
    decoding = (
        (requests, choose_splits(requests, heads, longest, multiprocessors))
        for requests in range(1, min(tokens, 1024) + 1)
    )
    most = max(splits * queries if splits > 1 else 0 for queries, splits in (*prompts, *decoding))
    return most * heads * (_padded(rank) + 1) * torch.float32.itemsize


def _padded(rank: int) -> int:
    """Numbers that a split leaves of a row."""
    return -(-rank // 16) * 16


@functools.lru_cache(maxsize=4096)
def choose_splits(requests: int, rows: int, context: int, multiprocessors: int) -> int:
    """Parts of each request, so that as many blocks of threads run at a time as fit, in as few turns.

    Args:
        rows: of one request, query tokens times heads.
        context: the most tokens of a request.
    """
    tiles, places = (1, 2 * multiprocessors) if rows <= FEW_ROWS else (-(-rows // 32), multiprocessors)
    blocks = requests * tiles
    most = max(1, min(context // LEAST_TOKENS, places))
    return min(range(1, most + 1), key=lambda splits: -(-blocks * splits // places) * (context / splits + SPLIT_COST))
