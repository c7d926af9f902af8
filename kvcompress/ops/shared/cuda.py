"""The CUDA kernels of layers that share a latent, on torch tensors (csrc/include/kvcompress/cuda_shared.h).

Keys are expanded and scored by one kernel, latents of values mixed by another, and expanded here; tokens of the running
step, which are attended as they are, are a third one's, and both parts are merged here. Nothing waits for the device or
reads from it, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.rows import DTYPES, rows_struct
from kvcompress.ops.shared import fragments as cuda_keys
from kvcompress.ops.shared.interface import SharedAttendArgs, StoreArgs
from kvcompress.ops.shared.plan import SharedPlan
from kvcompress.ops.shared.records import records_array, records_struct
from kvcompress.ops.sides import merged_bands, record_struct

MAX_STRIPES = 32
MAX_TILES = 64
MAX_TOKEN_BYTES = 1024
"""Of a record: what kernels hold of wider ones has no room in the shared memory of the smallest GPU, 99 KiB."""

SCORE_BYTES = 256 * 2**20
"""Scores lie in memory between the kernels: of so many requests at a time, of one at least."""

_LEAST_TOKENS = {"score": 1024, "mix": 1024}
"""Tokens of a split, so that its beginning, and of mixed values the merge, cost little."""

_BLOCKS = {"score": 2, "mix": 8}
"""Blocks of threads per multiprocessor that splits are to make."""


def library_for(records: Sequence[Tensor], specs: Sequence[SideSpec], *rows: Tensor) -> ctypes.CDLL | None:
    """The kernels, if these tensors are on a GPU and the kernels cover them."""
    device = records[0].device
    found = gpu.kernels(device)
    if found is None or not all(map(_known, specs)) or not all(map(_aligned, records)):
        return None
    if any(each.device != device or each.dtype not in DTYPES or each.stride(-1) != 1 for each in rows):
        return None
    return found


def covered(plan: SharedPlan) -> bool:
    """Whether the kernels attend layers like this one."""
    return (
        cuda_keys.covers(plan.k_mean_HD.shape[1])
        and plan.stripes <= MAX_STRIPES
        and _known(plan.k_spec)
        and _known(plan.v_spec)
    )


def _known(side: SideSpec) -> bool:
    bands = merged_bands(side)
    tiles = sum(cuda_keys.padded(*band) for band in bands) // cuda_keys.TILE
    bits = all(band.bits in cuda_library.BITS for band in bands)
    return bits and tiles <= MAX_TILES and side.bytes_per_token <= MAX_TOKEN_BYTES and not side.outliers


def _aligned(records_NHSX: Tensor) -> bool:
    return records_NHSX.data_ptr() % 16 == 0 and records_NHSX.stride(0) % 16 == 0 and records_NHSX.shape[2] % 16 == 0


def attend(
    library: ctypes.CDLL,
    output_THD: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    plan: SharedPlan,
    k_records: Sequence[Tensor],
    v_records: Sequence[Tensor],
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Tensor,
    seq_lens: Tensor,
    stored_lens: Tensor,
    exact_rows: Tensor,
    softmax_scale: float,
    max_query_len: int,
    splits: tuple[int, int] | None = None,
    score_bytes: int = SCORE_BYTES,
) -> None:
    """`ops.shared.attend` with everything on the device, tables and numbers in int32.

    Args:
        splits: parts that a request's tokens are cut into, for scores and for values; chosen from shapes alone if not
            given.
    """
    tokens, heads, head_dim = query_THD.shape
    requests, kv_heads = seq_lens.shape[0], plan.k_mean_HD.shape[0]
    # Zeros, because padding behind the last request is not written.
    mixed_THR = query_THD.new_zeros(tokens, heads, plan.v_decode_HRD.shape[1], dtype=torch.float32)
    exact_THD = query_THD.new_zeros(tokens, heads, head_dim, dtype=torch.float32)
    mixed_lse_TH, exact_lse_TH = query_THD.new_zeros(2, tokens, heads, dtype=torch.float32)
    if tokens and requests:
        sides = zip((*k_records, *v_records), (*k_tables, *v_tables), strict=True)
        context = min(records.shape[2] * table.shape[1] for records, table in sides)
        stride = -(-context // 64) * 64
        at_once = max(1, min(requests, score_bytes // (4 * max_query_len * heads * stride)))
        scores = query_THD.new_empty(at_once * max_query_len * heads * stride, dtype=torch.float32)
        if splits is None:
            score_blocks = at_once * kv_heads * -(-max_query_len * heads // (128 * kv_heads))
            mix_blocks = at_once * plan.stripes * -(-max_query_len * heads // 32)
            splits = _splits("score", score_blocks, context, query_THD), _splits("mix", mix_blocks, context, query_THD)
        partial = splits[1] * tokens * heads * (mixed_THR.shape[2] + 1) if splits[1] > 1 else 0
        workspace = mixed_THR.new_empty(partial)
        exact_starts = torch.nn.functional.pad((seq_lens - stored_lens).cumsum(0, dtype=torch.int32), (1, 0))
        described, kept = _described_keys(plan, query_THD)
        args = SharedAttendArgs(
            k=records_array(k_records, k_tables, plan.k_struct),
            v=records_array(v_records, v_tables, plan.v_struct),
            num_k=len(k_records),
            num_stripes=len(v_records),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            scores=scores.data_ptr(),
            score_stride=stride,
            mixed_THR=mixed_THR.data_ptr(),
            mixed_lse_TH=mixed_lse_TH.data_ptr(),
            exact_THD=exact_THD.data_ptr(),
            exact_lse_TH=exact_lse_TH.data_ptr(),
            workspace=workspace.data_ptr() if partial else None,
            query_starts=query_starts.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            stored_lens=stored_lens.data_ptr(),
            exact_rows=exact_rows.data_ptr(),
            exact_starts=exact_starts.data_ptr(),
            num_tokens=tokens,
            num_requests=requests,
            requests_at_once=at_once,
            max_query_len=max_query_len,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            score_splits=splits[0],
            mix_splits=splits[1],
            softmax_scale=softmax_scale,
            stream=gpu.stream(query_THD.device),
            **described,
        )
        cuda_library.check(library, library.kvc_cuda_shared_attend(ctypes.byref(args)))
        del kept
    mixed_THGR = mixed_THR.unflatten(1, (kv_heads, -1))
    stored_THGD = torch.einsum("thgr,hrd->thgd", mixed_THGR, plan.v_decode_HRD) + plan.v_mean_HD[:, None, :]
    share_TH1 = torch.sigmoid(mixed_lse_TH - exact_lse_TH)[..., None]
    output_THD.copy_(torch.lerp(exact_THD, stored_THGD.flatten(1, 2), share_TH1))


def workspace_bytes(plan: SharedPlan, tokens: int, num_heads: int, device: torch.device) -> int:
    """Bytes that `attend` takes at most beside its arguments, for steps of so many query tokens."""
    head_dim, rank = plan.k_mean_HD.shape[1], plan.v_decode_HRD.shape[1]
    # Mixed latents, once more in the order that a product wants; exact parts and outputs, before and after their mean
    # and merged; queries absorbed. Splits, of which there are no more than rows keep the device busy.
    row = 2 * rank + 6 * head_dim + plan.k_decode_HRD.shape[1]
    splits = _BLOCKS["mix"] * gpu.multiprocessors(device) * 32 * (rank + 1)
    return SCORE_BYTES + (tokens * num_heads * row + splits) * torch.float32.itemsize


def _described_keys(plan: SharedPlan, query_THD: Tensor) -> tuple[dict[str, object], list[Tensor]]:
    """What the kernels need of queries and decoders, and the tensors that it points to."""
    if plan.frequency_F is None:
        grouped_THGD = query_THD.float().unflatten(1, (plan.k_mean_HD.shape[0], -1))
        absorbed_THP = torch.einsum("thgd,hdp->thgp", grouped_THGD, plan.k_absorb_HDP).flatten(1, 2).contiguous()
        return {"query": rows_struct(absorbed_THP), "k_channels": absorbed_THP.shape[2]}, [absorbed_THP]
    keys = plan.k_fragments
    tensors = {
        "k_decode": keys.decode,
        "k_decode_unit": keys.unit_H,
        "k_mean": keys.mean_HW,
        "rope_frequency": keys.frequency_F,
        "rope_amplitude": keys.amplitude_1,
    }
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return {"query": rows_struct(query_THD), "k_channels": keys.width, **pointers}, list(tensors.values())


def _splits(what: str, blocks: int, context: int, query_THD: Tensor) -> int:
    wanted = -(-_BLOCKS[what] * gpu.multiprocessors(query_THD.device) // blocks)
    return max(1, min(wanted, context // _LEAST_TOKENS[what]))


def store(
    library: ctypes.CDLL,
    records_NHSX: Tensor,
    spec: SideSpec,
    latent_THR: Tensor,
    weight_HR: Tensor,
    slots_T: Tensor,
) -> None:
    """`ops.shared.store` on the device. A slot outside the cache is skipped."""
    assert latent_THR.stride(-1) == 1
    weight_HR, slots_T = weight_HR.float().contiguous(), slots_T.to(torch.int64).contiguous()
    args = StoreArgs(
        records=records_struct(records_NHSX, record_struct(spec)),
        latents=rows_struct(latent_THR),
        weight_HR=weight_HR.data_ptr(),
        slots=slots_T.data_ptr(),
        num_tokens=slots_T.shape[0],
        stream=gpu.stream(latent_THR.device),
    )
    cuda_library.check(library, library.kvc_cuda_store(ctypes.byref(args)))
