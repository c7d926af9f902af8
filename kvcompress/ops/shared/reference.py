"""The operations on records of form `shared` by the torch code that specifies them, on any device.

Records are `uint8 [blocks, records, tokens per block, bytes per token]`, a token's parts one after the other; blocks
may be strided. A slot is block * tokens per block + offset. A stripe of the group's latent is one record per token;
keys that a layer has for itself are one per KV head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec import scalar
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.record import Record
from kvcompress.codec.scalar import decode
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.ops.call import SCORE_BYTES
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.plan import SharedPlan


class SharedOp:
    """One layer's operations. Kernels inherit it and replace what they do faster; `attention.bind` chooses."""

    on_kernels = False
    """Whether CUDA kernels attend."""

    def __init__(self, codec: SharedCodec) -> None:
        self.plan = SharedPlan(codec)

    def store(
        self, records_NHSX: Tensor, spec: SideSpec, latent_THR: Tensor, weight_HR: Tensor, slots_T: Tensor
    ) -> None:
        """Encode normalized latents and store them in their slots. Slots below 0 are padding and are skipped.

        Args:
            latent_THR: float32 `[tokens, records, channels]`.
            weight_HR: importance of each channel's squared error, as `codec.scalar.encode` has it.

        Raises:
            ValueError: a slot lies outside the cache; on a GPU it is skipped.
        """
        valid_T = slots_T >= 0
        if not bool(valid_T.all()):
            latent_THR, slots_T = latent_THR[valid_T], slots_T[valid_T]
        block_size = records_NHSX.shape[2]
        encoded = scalar.encode(latent_THR, weight_HR, spec)
        records_NHSX[slots_T // block_size, :, slots_T % block_size] = encoded.to_bytes()

    def read(self, records_NHSX: Tensor, spec: SideSpec, block_table_N: Tensor, length: int) -> Tensor:
        """Normalized latents `[length, records, channels]` of a request's first tokens."""
        return _latents([records_NHSX], [block_table_N[None]], spec, 0, length)

    def attend(self, call: SharedCall) -> None:
        """
        Raises:
            ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked
                for on a GPU.
        """
        codec, exact_start = self.plan.codec, 0
        numbers = (call.query_starts, call.seq_lens, call.stored_lens)
        starts, lengths, stored_lens = (each.tolist() for each in numbers)
        for request, length in enumerate(lengths):
            stored = stored_lens[request]
            row_T = call.exact_rows[exact_start : exact_start + length - stored].long()
            exact_start += length - stored
            from_pages = stored + _after_last_negative(row_T)
            rows = slice(starts[request], starts[request + 1])
            if rows.start == rows.stop:
                continue
            k_read = (call.k_records, call.k_tables, codec.k.spec, request)
            if codec.rope is None:
                k_THD = torch.einsum("thr,hrd->thd", _latents(*k_read, length), codec.k.decode_HRD) + codec.k.mean_HD
            else:
                k_TR = _latents(*k_read, from_pages).flatten(1)
                k_THD = torch.einsum("tr,hrd->thd", k_TR, codec.k.decode_HRD) + codec.k.mean_HD
                k_THD = codec.rope.rotate(k_THD, torch.arange(from_pages, device=k_THD.device))
                k_THD = _with_exact(k_THD, call.keys_THD, row_T)
            v_TR = _latents(call.v_records, call.v_tables, codec.v.spec, request, from_pages).flatten(1)
            v_THD = torch.einsum("tr,hrd->thd", v_TR, codec.v.decode_HRD) + codec.v.mean_HD
            v_THD = _with_exact(v_THD, call.values_THD, row_T)
            _attend(call.output_THD[rows], call.query_THD[rows], k_THD, v_THD, call.softmax_scale)

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int) -> int:
        """Bytes that `attend` takes at most beside its arguments, in steps of `tokens`, for requests of `longest`."""
        spec = self.plan.codec.spec
        channels = len(spec.group) * (spec.k.rank + spec.v.rank) + 4 * spec.num_kv_heads * spec.head_dim
        scores = max(SCORE_BYTES, num_heads * longest * torch.float32.itemsize)
        return 3 * (longest * channels * torch.float32.itemsize + scores)


def _latents(records: Sequence[Tensor], tables: Sequence[Tensor], spec: SideSpec, request: int, length: int) -> Tensor:
    """Normalized latents of a request's first tokens, all records: `[tokens, records, channels]`."""
    parts = []
    for records_NHSX, table_RN in zip(records, tables, strict=True):
        blocks_N = table_RN[request, : -(-length // records_NHSX.shape[2])].long()
        record_THX = records_NHSX[blocks_N].transpose(1, 2).flatten(0, 1)[:length]
        parts.append(Record.from_bytes(record_THX, spec))
    return decode(Record.concatenate(parts), spec)


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
