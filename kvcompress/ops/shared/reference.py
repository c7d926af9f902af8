"""Attention of a layer that shares a latent, in torch, which specifies `ops.shared`: arguments are its."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops.heads.reference import SCORE_BYTES
from kvcompress.ops.shared.plan import SharedPlan


def store(records_NHSX: Tensor, spec: SideSpec, latent_THR: Tensor, weight_HR: Tensor, slots_T: Tensor) -> None:
    """`scalar.encode`, and its records in their slots."""
    from kvcompress.codec import scalar

    valid_T = slots_T >= 0
    if not bool(valid_T.all()):
        latent_THR, slots_T = latent_THR[valid_T], slots_T[valid_T]
    block_size = records_NHSX.shape[2]
    encoded = scalar.encode(latent_THR, weight_HR, spec)
    records_NHSX[slots_T // block_size, :, slots_T % block_size] = encoded.to_record()


def attend(
    output_THD: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    plan: SharedPlan,
    k_records: Sequence[Tensor],
    v_records: Sequence[Tensor],
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    stored_lens: Sequence[int],
    exact_rows: Tensor,
    softmax_scale: float,
) -> None:
    exact_start = 0
    for request, length in enumerate(seq_lens):
        stored = stored_lens[request]
        row_T = exact_rows[exact_start : exact_start + length - stored].long()
        exact_start += length - stored
        from_pages = stored + _after_last_negative(row_T)
        rows = slice(query_starts[request], query_starts[request + 1])
        if rows.start == rows.stop:
            continue
        if plan.frequency_F is None:
            k_THD = _latents(k_records, k_tables, plan.k_spec, request, length)
            k_THD = torch.einsum("thr,hrd->thd", k_THD, plan.k_decode_HRD) + plan.k_mean_HD
        else:
            k_THD = _with_exact(_stored_keys(plan, k_records, k_tables, request, from_pages), keys_THD, row_T)
        v_TR = _latents(v_records, v_tables, plan.v_spec, request, from_pages).flatten(1)
        v_THD = torch.einsum("tr,hrd->thd", v_TR, plan.v_decode_HRD) + plan.v_mean_HD
        v_THD = _with_exact(v_THD, values_THD, row_T)
        _attend(output_THD[rows], query_THD[rows], k_THD, v_THD, softmax_scale)


def _stored_keys(
    plan: SharedPlan, records: Sequence[Tensor], tables: Sequence[Tensor], request: int, length: int
) -> Tensor:
    from kvcompress.codec.rope import Rope

    assert plan.frequency_F is not None
    assert plan.amplitude_1 is not None
    latent_TR = _latents(records, tables, plan.k_spec, request, length).flatten(1)
    k_THD = torch.einsum("tr,hrd->thd", latent_TR, plan.k_decode_HRD) + plan.k_mean_HD
    return Rope(plan.frequency_F, plan.amplitude_1).rotate(k_THD, torch.arange(length, device=k_THD.device))


def _latents(records: Sequence[Tensor], tables: Sequence[Tensor], spec: SideSpec, request: int, length: int) -> Tensor:
    """Normalized latents of a request's first tokens, all records: `[tokens, records, channels]`."""
    from kvcompress.codec.scalar import Encoded, decode

    parts = []
    for records_NHSX, table_RN in zip(records, tables, strict=True):
        blocks_N = table_RN[request, : -(-length // records_NHSX.shape[2])].long()
        record_THX = records_NHSX[blocks_N].transpose(1, 2).flatten(0, 1)[:length]
        parts.append(Encoded.from_record(record_THX, spec))
    return decode(Encoded.concatenate(parts), spec)


def _after_last_negative(row_T: Tensor) -> int:
    found = (row_T < 0).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def _with_exact(stored_THD: Tensor, step_THD: Tensor, row_T: Tensor) -> Tensor:
    """All tokens of a request: its last ones are the step's rows `row_T`, or as stored where that is negative."""
    row_T = row_T.to(step_THD.device)
    exact_THD = step_THD[row_T.clamp_min(0)].float()
    among = _after_last_negative(row_T)
    first = stored_THD.shape[0] - among
    exact_THD[:among] = torch.where(row_T[:among, None, None] < 0, stored_THD[first:], exact_THD[:among])
    return torch.cat([stored_THD[:first], exact_THD])


def _attend(output_QHD: Tensor, query_QHD: Tensor, keys_THD: Tensor, values_THD: Tensor, scale: float) -> None:
    """Causal attention of the newest tokens over all, in float32, a bounded number of queries at a time."""
    queries, tokens = query_QHD.shape[0], keys_THD.shape[0]
    keys_HTD, values_HTD = keys_THD.transpose(0, 1), values_THD.transpose(0, 1)
    step = max(1, SCORE_BYTES // (4 * query_QHD.shape[1] * tokens))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        visible = tokens - (queries - last)
        seen = torch.ones(last - first, visible, dtype=torch.bool, device=keys_THD.device).tril(
            visible - (last - first)
        )
        mixed_HQD = torch.nn.functional.scaled_dot_product_attention(
            query_QHD[first:last].transpose(0, 1).float(),
            keys_HTD[:, :visible],
            values_HTD[:, :visible],
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )
        output_QHD[first:last] = mixed_HQD.transpose(0, 1).to(output_QHD.dtype)
