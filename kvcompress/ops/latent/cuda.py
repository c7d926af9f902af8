"""The CUDA kernels on pages of form `latent`. Nothing here waits for the device or reads from it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kvcompress.ops import cuda_library, gpu, interface
from kvcompress.ops.call import Call
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.rows import rows_struct

LEAST_TOKENS = 128
"""A split has at least as many; the kernels see to it (csrc/cuda/latent/args.h)."""

SPLIT_COST = 256
"""Tokens in whose time a split begins and is merged, estimated from the bytes of both."""

FEW_ROWS = 16
"""Query rows of a request up to which two blocks of threads fit on a multiprocessor."""


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.LatentPages),
        ("query", interface.Rows),
        ("output", interface.Rows),
        ("workspace", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_requests", ctypes.c_int32),
        ("max_query_len", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    )


class AppendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.LatentPages),
        ("keys", interface.Rows),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


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
            slots=slots_T.data_ptr(),
            num_tokens=slots_T.shape[0],
            stream=gpu.stream(pages_NSC.device),
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
        table_RN, starts_R, lengths_R = call.numbers(query_THC.device)
        max_query_len = call.most_queries
        tokens, heads, rank = output_THR.shape
        requests = lengths_R.shape[0]
        if not tokens or not requests:
            return
        assert table_RN.stride(-1) == 1
        if splits is None:
            context = table_RN.shape[1] * pages_NSC.shape[1]
            splits = choose_splits(requests, max_query_len * heads, context, gpu.multiprocessors(pages_NSC.device))
        partial = _partial(splits, tokens * heads, rank)
        workspace = torch.empty(partial, device=pages_NSC.device)
        args = AttendArgs(
            pages=latent_pages_struct(pages_NSC),
            query=rows_struct(query_THC),
            output=rows_struct(output_THR),
            workspace=workspace.data_ptr() if partial else None,
            block_table=table_RN.data_ptr(),
            block_table_stride=table_RN.stride(0),
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_tokens=tokens,
            num_requests=requests,
            max_query_len=max_query_len,
            num_heads=heads,
            rank=rank,
            splits=splits,
            softmax_scale=call.softmax_scale,
            stream=gpu.stream(pages_NSC.device),
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
    most = max(_partial(splits, queries * heads, rank) for queries, splits in (*prompts, *decoding))
    return most * torch.float32.itemsize


def _partial(splits: int, rows: int, rank: int) -> int:
    """Numbers that splits leave to be merged: of every row its sums, and their weight."""
    padded_rank = -(-rank // 16) * 16
    return splits * rows * (padded_rank + 1) if splits > 1 else 0


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
