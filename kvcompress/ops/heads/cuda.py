"""The CUDA kernels on torch tensors.

A query is absorbed and an output expanded by torch's matrix products; what lies between, everything that grows with the
context, is the kernels'. Nothing here waits for the device or reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.heads.layout import CHUNK_TOKENS, FRAGMENT, PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import cuda_library, gpu, interface
from kvcompress.ops.heads.plan import HeadsPlan, SidePlan
from kvcompress.ops.rows import DTYPES, rows_struct
from kvcompress.ops.sides import side_struct

_MAX_TILES = 17


def library_for(pages_NHX: Tensor, layout: PageLayout, plan: HeadsPlan, *rows_THD: Tensor) -> ctypes.CDLL | None:
    """The kernels, if these tensors are on a GPU and the kernels cover them."""
    found = gpu.kernels(pages_NHX.device)
    if found is None or not covered(layout, plan):
        return None
    if any(rows.device != pages_NHX.device or rows.dtype not in DTYPES or rows.stride(-1) != 1 for rows in rows_THD):
        return None
    return found if fits(found, plan.spec) else None


def covered(layout: PageLayout, plan: HeadsPlan) -> bool:
    """Whether there is a kernel for these pages."""
    return layout.order == FRAGMENT and covers_blocks(layout.block_size) and _known(plan.k.spec, plan.v.spec)


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
    pages = interface.Pages(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        k=side_struct(layer.k, layout.k),
        v=side_struct(layer.v, layout.v),
    )
    return bool(library.kvc_cuda_covers(ctypes.byref(pages)) == 0)


def _known(*sides: SideSpec) -> bool:
    return all(_side_known(side) for side in sides)


def _side_known(side: SideSpec) -> bool:
    tiles = sum(-(-band.width // 16) for band in side.bands)
    stored = all(band.bits in cuda_library.BITS for band in side.bands)
    return stored and side.rank <= cuda_library.MAX_RANK and tiles <= _MAX_TILES and len(side.bands) <= 4


def attend(
    library: ctypes.CDLL,
    output_THD: Tensor,
    query_THD: Tensor,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_RN: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    lse_TH: Tensor | None = None,
    max_query_len: int | None = None,
    splits: int | None = None,
) -> None:
    """`ops.attention.decode_attention` with everything on the device; see `attend_latents`."""
    grouped_THGD = query_THD.float().unflatten(1, (layout.num_kv_heads, -1))
    absorbed_THGR = torch.einsum("thgd,hdr->thgr", grouped_THGD, plan.k_decode_HDR)
    mixed_THR, found_TH = attend_latents(
        library,
        absorbed_THGR.flatten(1, 2).contiguous(),
        pages_NHX,
        layout,
        plan,
        block_table_RN,
        query_starts,
        seq_lens,
        softmax_scale,
        max_query_len,
        splits,
    )
    mixed_THGR = mixed_THR.unflatten(1, (layout.num_kv_heads, -1))
    output_THGD = torch.einsum("thgr,hrd->thgd", mixed_THGR, plan.v.decode_HRD) + plan.v.mean_HD[:, None, :]
    output_THD.copy_(output_THGD.flatten(1, 2))
    if lse_TH is not None:
        mean_THG = torch.einsum("thgd,hd->thg", grouped_THGD, plan.k.mean_HD)
        lse_TH.copy_(found_TH + softmax_scale * mean_THG.flatten(1))


def workspace_bytes(spec: HeadsSpec | BlocksSpec, tokens: int, num_heads: int, device: torch.device) -> int:
    """Bytes that `attend` takes at most beside its arguments, for steps of so many query tokens."""
    # Queries in float32 and the output, before and after its mean; absorbed queries and mixed latents, once more in the
    # order that a product wants; splits, of which there are no more than rows keep the device busy (`choose_splits`).
    row = 3 * spec.head_dim + 2 * spec.k.rank + 2 * spec.v.rank + 2
    splits = 4 * gpu.multiprocessors(device) * gpu.ROWS * (spec.v.rank + 1)
    return (tokens * num_heads * row + splits) * torch.float32.itemsize


def attend_latents(
    library: ctypes.CDLL,
    absorbed_THR: Tensor,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_RN: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    max_query_len: int | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed queries to mixed latents of values `[tokens, query heads, v rank]` and lse, without the means' shares.

    Args:
        absorbed_THR: queries times k_decode, float32, contiguous `[tokens, query heads, k rank]`.
        block_table_RN, query_starts, seq_lens: int32, on the device.
        max_query_len: the most queries of a request; without it, all tokens could be one request's.
        splits: parts a request's tokens are cut into; chosen from shapes alone if not given.
    """
    tokens, heads, _ = absorbed_THR.shape
    requests, kv_heads = seq_lens.shape[0], layout.num_kv_heads
    # Zeros, because padding behind the last request is not written.
    mixed_THR = absorbed_THR.new_zeros(tokens, heads, plan.v.spec.rank)
    lse_TH = absorbed_THR.new_zeros(tokens, heads)
    if not tokens or not requests:
        return mixed_THR, lse_TH
    assert block_table_RN.stride(-1) == 1
    longest = tokens if max_query_len is None else max_query_len
    if splits is None:
        tiles = -(-longest * heads // (kv_heads * gpu.ROWS))
        context = block_table_RN.shape[1] * layout.block_size
        splits = gpu.choose_splits(requests * kv_heads * tiles, context, gpu.multiprocessors(absorbed_THR.device))
    partial = splits * tokens * heads * (plan.v.spec.rank + 1) if splits > 1 else 0
    workspace = absorbed_THR.new_empty(partial)
    args = cuda_library.AttendArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        query_THR=absorbed_THR.data_ptr(),
        output_THR=mixed_THR.data_ptr(),
        lse_TH=lse_TH.data_ptr(),
        workspace=workspace.data_ptr() if partial else None,
        block_table=block_table_RN.data_ptr(),
        block_table_stride=block_table_RN.stride(0),
        query_starts=query_starts.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        num_tokens=tokens,
        num_requests=requests,
        max_query_len=longest,
        num_heads=heads,
        splits=splits,
        softmax_scale=softmax_scale,
        stream=gpu.stream(absorbed_THR.device),
    )
    cuda_library.check(library, library.kvc_cuda_attend(ctypes.byref(args)))
    return mixed_THR, lse_TH


def append(
    library: ctypes.CDLL,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    keys_THD: Tensor,
    values_THD: Tensor,
    slots_T: Tensor | None = None,
    blocks_N: Tensor | None = None,
) -> None:
    """`ops.append.append` on the device; with blocks (int64) instead of slots, `ops.compress.compress_pages`.

    A slot outside the cache is skipped: refusing it would mean waiting for the device.
    """
    assert (slots_T is None) != (blocks_N is None)
    args = cuda_library.AppendArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        slots=None if slots_T is None else slots_T.data_ptr(),
        blocks=None if blocks_N is None else blocks_N.data_ptr(),
        num_tokens=keys_THD.shape[0],
        stream=gpu.stream(keys_THD.device),
        **_encode_tensors("k", plan.k),
        **_encode_tensors("v", plan.v),
    )
    cuda_library.check(library, library.kvc_cuda_append(ctypes.byref(args)))


def gather(
    library: ctypes.CDLL,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_N: Tensor,
    length: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`ops.gather.gather_decode` on the device; the block table is int32."""
    heads = layout.num_kv_heads
    k_THR, v_THR = (
        torch.empty(length, heads, side.spec.rank, dtype=dtype, device=pages_NHX.device) for side in (plan.k, plan.v)
    )
    args = cuda_library.GatherArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        keys_THR=k_THR.data_ptr(),
        values_THR=v_THR.data_ptr(),
        dtype=DTYPES[dtype],
        block_table=block_table_N.data_ptr(),
        num_tokens=length,
        stream=gpu.stream(pages_NHX.device),
    )
    cuda_library.check(library, library.kvc_cuda_gather(ctypes.byref(args)))
    return k_THR, v_THR


def _encode_tensors(name: str, side: SidePlan) -> dict[str, int]:
    tensors = {"mean_HD": side.mean_HD, "encode_HDR": side.encode_HDR, "weight_HR": side.weight_HR}
    return {f"{name}_{tensor}": value.data_ptr() for tensor, value in tensors.items()}
