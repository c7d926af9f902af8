"""The CPU kernels of layers that share a latent (csrc/cpu/shared.h), on torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops import interface, library
from kvcompress.ops.rows import rows_struct
from kvcompress.ops.shared.plan import SharedPlan
from kvcompress.ops.shared.records import records_array, records_struct
from kvcompress.ops.sides import record_struct


def store(
    compiled: ctypes.CDLL,
    records_NHSX: Tensor,
    spec: SideSpec,
    latent_THR: Tensor,
    weight_HR: Tensor,
    slots_T: Tensor,
) -> None:
    """`ops.shared.store`."""
    assert latent_THR.shape == (slots_T.shape[0], records_NHSX.shape[1], spec.rank)
    slots_T, weight_HR = slots_T.to(torch.int64).contiguous(), weight_HR.float().contiguous()
    args = interface.StoreArgs(
        records=records_struct(records_NHSX, record_struct(spec)),
        latents=rows_struct(latent_THR),
        weight_HR=weight_HR.data_ptr(),
        slots=slots_T.data_ptr(),
        num_tokens=slots_T.shape[0],
        threads=torch.get_num_threads(),
        level=library.level(),
    )
    library.check(compiled.kvc_store(ctypes.byref(args)))


def attend(
    compiled: ctypes.CDLL,
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
    split_tokens: int,
) -> None:
    """`ops.shared.attend`, for exact rows none of which is stored after all; tables and numbers in int32."""
    codes, scale = None, None
    if plan.frequency_F is not None and library.level() >= library.LEVELS.index("avx512vnni"):
        codes, scale = plan.k_codes_blocked or (None, None)
    own = plan.frequency_F is None
    exact_starts = torch.nn.functional.pad((seq_lens - stored_lens).cumsum(0, dtype=torch.int32), (1, 0))
    args = interface.SharedAttendArgs(
        k=records_array(k_records, k_tables, plan.k_struct),
        v=records_array(v_records, v_tables, plan.v_struct),
        num_k=len(k_records),
        num_stripes=len(v_records),
        query=rows_struct(query_THD),
        output=rows_struct(output_THD),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        k_mean_HD=plan.k_mean_HD.data_ptr(),
        k_decode_HDR=plan.k_decode_HDR.data_ptr() if own else None,
        k_decode_blocked=None if own or codes is not None else plan.k_decode_blocked.data_ptr(),
        k_codes_blocked=None if codes is None else codes.data_ptr(),
        k_scale_HD=None if scale is None else scale.data_ptr(),
        v_decode_HRD=plan.v_decode_HRD.data_ptr(),
        v_mean_HD=plan.v_mean_HD.data_ptr(),
        rope_frequency_F=None if plan.frequency_F is None else plan.frequency_F.data_ptr(),
        rope_amplitude=plan.amplitude,
        query_starts=query_starts.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        stored_lens=stored_lens.data_ptr(),
        exact_rows=exact_rows.data_ptr(),
        exact_starts=exact_starts.data_ptr(),
        num_requests=seq_lens.shape[0],
        num_heads=query_THD.shape[1],
        num_kv_heads=plan.k_mean_HD.shape[0],
        head_dim=plan.k_mean_HD.shape[1],
        softmax_scale=softmax_scale,
        split_tokens=split_tokens,
        threads=torch.get_num_threads(),
        level=library.level(),
    )
    library.check(compiled.kvc_shared_attend(ctypes.byref(args)))
