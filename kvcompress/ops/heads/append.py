"""Encoding new tokens into cache pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.ops import interface, library
from kvcompress.ops.heads import cuda, reference
from kvcompress.ops.heads.plan import HeadsPlan
from kvcompress.ops.rows import rows_covered, rows_struct


def append(
    pages_NHX: Tensor, layout: PageLayout, plan: HeadsPlan, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor
) -> None:
    """Encode tokens and store them in their slots.

    Args:
        pages_NHX: `uint8 [num_blocks, num_kv_heads, record_bytes]`, written in place; blocks may be strided.
        keys_THD, values_THD: `[tokens, num_kv_heads, head_dim]`, keys after RoPE; float32, bfloat16 or float16.
        slots_T: block * block_size + offset of each token; below 0: padding, skipped.

    Raises:
        ValueError: a slot lies outside the cache; on a GPU, such a slot is skipped.
    """
    assert keys_THD.shape == values_THD.shape
    assert keys_THD.shape[0] == slots_T.shape[0]
    on_device = cuda.library_for(pages_NHX, layout, plan, keys_THD, values_THD)
    if on_device is not None:
        slots_T = slots_T.to(torch.int64).contiguous()
        cuda.append(on_device, pages_NHX, layout, plan, keys_THD, values_THD, slots_T)
        return
    covered = plan.covered(layout, pages_NHX) and rows_covered(keys_THD, values_THD)
    compiled = library.load() if covered else None
    if compiled is None:
        reference.append(pages_NHX, layout, plan, keys_THD, values_THD, slots_T)
        return
    slots_T = slots_T.to(torch.int64).contiguous()
    args = interface.AppendArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        slots=slots_T.data_ptr(),
        num_tokens=slots_T.shape[0],
        k_mean_HD=plan.k.mean_HD.data_ptr(),
        k_encode_HDR=plan.k.encode_HDR.data_ptr(),
        k_weight_HR=plan.k.weight_HR.data_ptr(),
        v_mean_HD=plan.v.mean_HD.data_ptr(),
        v_encode_HDR=plan.v.encode_HDR.data_ptr(),
        v_weight_HR=plan.v.weight_HR.data_ptr(),
        threads=torch.get_num_threads(),
        level=library.level(),
    )
    library.check(compiled.kvc_append(ctypes.byref(args)))


@torch.library.custom_op("kvcompress::append", mutates_args=("pages",))
def append_op(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
) -> None:
    """`append` for graphs; tensors and numbers are `HeadsPlan.flatten()`'s."""
    plan = HeadsPlan.unflatten(tensors, numbers)
    append(pages, PageLayout.of(plan.spec, block_size, order), plan, keys, values, slots)


@append_op.register_fake
def _(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
) -> None:
    return None
