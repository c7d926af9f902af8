"""The CUDA kernels on pages of form `heads`, in fragment order.

A query is absorbed and an output expanded by torch's matrix products; what lies between, everything that grows with the
context, is the kernels'. Nothing here waits for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import CHUNK_TOKENS, FRAGMENT
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.call import Call
from kvcompress.ops.heads import prefill
from kvcompress.ops.heads.reference import HeadsOp
from kvcompress.ops.interface.common import MAX_BANDS
from kvcompress.ops.interface.heads import CUDA_MAX_RANK, CUDA_MAX_TILES, AppendArgs, GatherArgs, Pages
from kvcompress.ops.rows import DTYPES, int32_rows, rows_struct
from kvcompress.ops.sides import side_struct


def covers_blocks(block_size: int) -> bool:
    """Whether the kernels read pages of so many tokens: a power of two of chunks."""
    chunks, rest = divmod(block_size, CHUNK_TOKENS)
    return rest == 0 and chunks > 0 and chunks & (chunks - 1) == 0


def covers(library: ctypes.CDLL, layer: HeadsSpec) -> bool:
    """Whether there is a kernel for this layer, and room for what it keeps."""
    return _known(layer.k, layer.v) and fits(library, layer)


@functools.cache
def fits(library: ctypes.CDLL, layer: HeadsSpec) -> bool:
    """Whether the GPU's shared memory has room for what attention keeps of a layer that is known: of all it covers on
    an H100 or H200; not of 256 channels in 16 bits each on an A100, nor in 8 bits each on 8.6 and 8.9."""
    layout = PageLayout.of(layer, CHUNK_TOKENS, FRAGMENT)
    pages = Pages(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        k=side_struct(layer.k, layout.k),
        v=side_struct(layer.v, layout.v),
    )
    return bool(library.kvc_cuda_heads_covers(ctypes.byref(pages)) == 0)


def _known(*sides: SideSpec) -> bool:
    return all(_side_known(side) for side in sides)


def _side_known(side: SideSpec) -> bool:
    tiles = sum(-(-band.width // 16) for band in side.bands)
    small = side.rank <= CUDA_MAX_RANK and tiles <= CUDA_MAX_TILES and len(side.bands) <= MAX_BANDS
    return side.unpacked_by("cuda") and small


class CudaHeads(HeadsOp):
    """Storing, reading and attending a few queries per request by kernels; prompts by torch on what they read."""

    on_kernels = True

    def __init__(self, kernels: ctypes.CDLL, codec: HeadsCodec) -> None:
        super().__init__(codec, FRAGMENT)
        self._kernels = kernels

    def layout(self, pages_NHX: Tensor) -> PageLayout:
        layout = super().layout(pages_NHX)
        assert covers_blocks(layout.block_size), layout.block_size
        return layout

    def append(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> None:
        """A slot outside the cache is skipped: refusing it would mean waiting for the device."""
        self._append(pages_NHX, keys_THD, values_THD, slots_T, whole_blocks=False)

    def compress(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, blocks_N: Tensor) -> None:
        self._filled_block_size(pages_NHX, keys_THD, blocks_N)
        self._append(pages_NHX, keys_THD, values_THD, blocks_N, whole_blocks=True)

    def _append(
        self,
        pages_NHX: Tensor,
        keys_THD: Tensor,
        values_THD: Tensor,
        numbers: Tensor,
        whole_blocks: bool,
    ) -> None:
        numbers = numbers.to(pages_NHX.device, torch.int64).contiguous()
        args = AppendArgs(
            pages=self.plan.pages_struct(pages_NHX, self.order),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            slots=None if whole_blocks else numbers,
            blocks=numbers if whole_blocks else None,
            num_tokens=keys_THD.shape[0],
            k=self.plan.encoders[0],
            v=self.plan.encoders[1],
            run=gpu.run(keys_THD.device, keys_THD.shape[0]),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_heads_append(ctypes.byref(args)))

    def read(
        self, pages_NHX: Tensor, block_table_N: Tensor, length: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        spec, device = self.plan.spec, pages_NHX.device
        block_table_N = int32_rows(block_table_N, device)
        k_THR, v_THR = (
            torch.empty(length, spec.num_kv_heads, side.rank, dtype=dtype, device=device) for side in (spec.k, spec.v)
        )
        args = GatherArgs(
            pages=self.plan.pages_struct(pages_NHX, self.order),
            keys_THR=k_THR,
            values_THR=v_THR,
            dtype=DTYPES[dtype],
            block_table=block_table_N,
            num_tokens=length,
            stream=gpu.stream(device),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_heads_gather(ctypes.byref(args)))
        return k_THR, v_THR

    def attend(self, call: Call, pages_NHX: Tensor, splits: int | None = None) -> None:
        """More queries of a request than `gpu.MOST_QUERIES` are a prefill.

        Args:
            splits: parts a request's tokens are cut into; chosen from shapes alone if not given.
        """
        if call.most_queries > gpu.MOST_QUERIES:
            if call.lse_TH is None and call.query_THD.dtype in prefill.FUSED_DTYPES:
                prefill.attend(self, call, pages_NHX)
            else:
                super().attend(call, pages_NHX)
            return
        spec, k, v = self.plan.spec, self.plan.codec.k, self.plan.codec.v
        grouped_THGD = call.query_THD.float().unflatten(1, (spec.num_kv_heads, -1))
        absorbed_THGR = torch.einsum("thgd,hdr->thgr", grouped_THGD, self.plan.k_decode_HDR)
        mixed_THR, found_TH = self.attend_latents(call, absorbed_THGR.flatten(1, 2).contiguous(), pages_NHX, splits)
        mixed_THGR = mixed_THR.unflatten(1, (spec.num_kv_heads, -1))
        output_THGD = torch.einsum("thgr,hrd->thgd", mixed_THGR, v.decode_HRD) + v.mean_HD[:, None, :]
        call.output_THD.copy_(output_THGD.flatten(1, 2))
        if call.lse_TH is not None:
            mean_THG = torch.einsum("thgd,hd->thg", grouped_THGD, k.mean_HD)
            call.lse_TH.copy_(found_TH + call.softmax_scale * mean_THG.flatten(1))

    def attend_latents(
        self, call: Call, absorbed_THR: Tensor, pages_NHX: Tensor, splits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Absorbed queries to mixed latents of values `[tokens, query heads, v rank]` and lse, without the means'
        shares.

        Args:
            absorbed_THR: queries times k_decode, float32, contiguous `[tokens, query heads, k rank]`.
        """
        layout = self.layout(pages_NHX)
        pages = self.plan.pages_struct(pages_NHX, self.order)
        shape = (layout.num_kv_heads, layout.block_size, self.plan.spec.v.rank)
        kernel = self._kernels.kvc_cuda_heads_attend
        return gpu.attend_latents(self._kernels, kernel, pages, call, absorbed_THR, shape, splits)

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int, dtype: torch.dtype) -> int:
        spec, device = self.plan.spec, self.plan.codec.k.mean_HD.device
        # Of prompts; in float32 they take torch's path.
        prompt = (
            prefill.workspace_bytes(spec, tokens, num_heads, longest, dtype)
            if dtype in prefill.FUSED_DTYPES
            else super().workspace_bytes(tokens, num_heads, longest, dtype)
        )
        return max(prompt, gpu.workspace_bytes(spec.head_dim, spec.k.rank, spec.v.rank, tokens, num_heads, device))
