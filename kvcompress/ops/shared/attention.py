"""Attention of one layer that shares a latent with the others of its group, and the records it is stored in.

Records are `uint8 [blocks, records, tokens per block, bytes per token]`, a token's parts one after the other; blocks
may be strided. A slot is block * tokens per block + offset. A stripe of the group's latent is one record per token;
keys that a layer has for itself are one per KV head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops import gpu, interface, library
from kvcompress.ops.rows import int32_rows, rows_covered
from kvcompress.ops.shared import cpu as shared_host
from kvcompress.ops.shared import cuda as cuda_shared
from kvcompress.ops.shared import reference as shared_reference
from kvcompress.ops.shared.plan import SharedPlan
from kvcompress.ops.sides import spec_of

Numbers = Tensor | Sequence[int]

SPLIT_TOKENS = 512
"""Tokens one thread attends at a time: few, because keys are expanded and all heads are one piece of work."""

EXPAND_QUERIES = 256
"""From this many queries of a request on, its keys and values are expanded once for all of them, in torch.

The kernels expand keys once per 64 rows of queries; torch does it once, but with values, and scores take it longer.
"""


def store(records_NHSX: Tensor, spec: SideSpec, latent_THR: Tensor, weight_HR: Tensor, slots_T: Tensor) -> None:
    """Encode normalized latents and store them in their slots. Slots below 0 are padding and are skipped.

    Args:
        latent_THR: float32 `[tokens, records, channels]`.
        weight_HR: importance of each channel's squared error, as `codec.scalar.encode` has it.

    Raises:
        ValueError: a slot lies outside the cache; on a GPU it is skipped.
    """
    on_device = cuda_shared.library_for([records_NHSX], [spec], latent_THR)
    if on_device is not None and latent_THR.dtype == torch.float32:
        cuda_shared.store(on_device, records_NHSX, spec, latent_THR, weight_HR, slots_T)
        return
    covered = _on_host(records_NHSX) and rows_covered(latent_THR) and latent_THR.dtype == torch.float32
    covered = covered and spec.rank <= interface.MAX_HEAD_DIM and not spec.outliers
    compiled = library.load() if covered else None
    if compiled is None:
        shared_reference.store(records_NHSX, spec, latent_THR, weight_HR, slots_T)
        return
    shared_host.store(compiled, records_NHSX, spec, latent_THR, weight_HR, slots_T)


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
    query_starts: Numbers,
    seq_lens: Numbers,
    stored_lens: Numbers,
    exact_rows: Tensor,
    softmax_scale: float,
    split_tokens: int = SPLIT_TOKENS,
    expand_queries: int = EXPAND_QUERIES,
    max_query_len: int | None = None,
) -> None:
    """Causal attention of every request's newest tokens over all its tokens.

    A request's first tokens are attended as they are stored, the others as they are: rows of the running step. Keys of
    the layer's own are all attended as stored.

    Args:
        output_THD: result, written in place `[tokens, query heads, head_dim]`.
        query_THD: post-RoPE queries of all requests; float32, bfloat16 or float16; may be padded at the end.
        keys_THD, values_THD: the step's own `[tokens, KV heads, head_dim]`, keys after RoPE.
        k_records, v_records: one per layer of the group; keys of the layer's own: its records alone.
        k_tables, v_tables: for each of them, block numbers `[requests, blocks]` of each request's tokens, in order.
        query_starts: where each request's queries begin, and the end of the last `[requests + 1]`.
        seq_lens: tokens of each request, its queries' own included `[requests]`.
        stored_lens: how many of them are attended as they are stored `[requests]`.
        exact_rows: for each of the others, request after request, its row in `keys_THD` and `values_THD`; -1 where it
            is as it is stored after all.
        softmax_scale: usually head_dim ** -0.5.
        split_tokens: a positive multiple of 64; of no effect on a GPU.
        expand_queries: requests with as many queries go to torch code; on a GPU, those with more than a few.
        max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
            enough threads for any lengths.

    Raises:
        ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked for on
            a GPU.
    """
    records, rows_THD = (*k_records, *v_records), (query_THD, output_THD, keys_THD, values_THD)
    layer = (keys_THD, values_THD, plan, k_records, v_records)
    on_device = cuda_shared.library_for(records, (plan.k_spec, plan.v_spec), *rows_THD)
    if not cuda_shared.covered(plan):
        on_device = None
    if on_device is not None and isinstance(query_starts, Tensor) and query_starts.device == query_THD.device:
        most = query_THD.shape[0] if max_query_len is None else max_query_len
        if most <= gpu.MOST_QUERIES:
            batch = _on(query_THD.device, k_tables, v_tables, query_starts, seq_lens, stored_lens, exact_rows)
            arguments = (output_THD, query_THD, *layer, *batch, softmax_scale)
            cuda_shared.attend(on_device, *arguments, most)
            return
    starts_R, lengths_R, stored_R = int32_rows(query_starts), int32_rows(seq_lens), int32_rows(stored_lens)
    rows = int32_rows(exact_rows)
    exact_R = torch.nn.functional.pad((lengths_R - stored_R).cumsum(0, dtype=torch.int32), (1, 0))
    covered = plan.covered() and rows_covered(*rows_THD) and all(map(_on_host, records)) and bool((rows >= 0).all())
    compiled = library.load() if covered else None
    queries_R = starts_R.diff()
    if on_device is not None:
        kernel_R = queries_R <= gpu.MOST_QUERIES
    else:
        kernel_R = queries_R < (expand_queries if compiled is not None else 0)
    for start, stop in _runs(kernel_R.tolist()):
        k_run, v_run = ([table_RN[start:stop] for table_RN in tables] for tables in (k_tables, v_tables))
        exact = rows[exact_R[start] : exact_R[stop]]
        starts_run, lengths_run, stored_run = starts_R[start : stop + 1], lengths_R[start:stop], stored_R[start:stop]
        if not kernel_R[start]:
            numbers = (k_run, v_run, starts_run.tolist(), lengths_run.tolist(), stored_run.tolist(), exact)
            shared_reference.attend(*(output_THD, query_THD, *layer, *numbers, softmax_scale))
        elif on_device is not None:
            own, most = slice(int(starts_run[0]), int(starts_run[-1])), int(queries_R[start:stop].max())
            batch = _on(query_THD.device, k_run, v_run, starts_run - starts_run[0], lengths_run, stored_run, exact)
            arguments = (output_THD[own], query_THD[own], *layer, *batch, softmax_scale)
            cuda_shared.attend(on_device, *arguments, most)
        else:
            assert compiled is not None
            batch = _on("cpu", k_run, v_run, starts_run, lengths_run, stored_run, exact)
            arguments = (output_THD, query_THD, *layer, *batch, softmax_scale)
            shared_host.attend(compiled, *arguments, split_tokens)


def _on(
    device: torch.device | str,
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Numbers,
    seq_lens: Numbers,
    stored_lens: Numbers,
    exact_rows: Numbers,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """A batch's numbers as kernels read them, on a device."""
    return (
        [int32_rows(table_RN, device) for table_RN in k_tables],
        [int32_rows(table_RN, device) for table_RN in v_tables],
        int32_rows(query_starts, device),
        int32_rows(seq_lens, device),
        int32_rows(stored_lens, device),
        int32_rows(exact_rows, device),
    )


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Neighbours of one flag, as ranges."""
    ends = [i + 1 for i, flag in enumerate(flags) if i + 1 == len(flags) or flags[i + 1] != flag]
    return list(zip([0, *ends], ends, strict=False))


def _on_host(records_NHSX: Tensor) -> bool:
    return records_NHSX.device.type == "cpu"


@torch.library.custom_op("kvcompress::store_records", mutates_args=("records",))
def store_op(records: Tensor, latents: Tensor, weight: Tensor, slots: Tensor, spec: Sequence[int]) -> None:
    """`store` for graphs; the spec is `spec_numbers`'."""
    store(records, spec_of(spec), latents, weight, slots)


@store_op.register_fake
def _(records: Tensor, latents: Tensor, weight: Tensor, slots: Tensor, spec: Sequence[int]) -> None:
    return None


@torch.library.custom_op("kvcompress::shared_attention", mutates_args=())
def attend_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k_records: Sequence[Tensor],
    v_records: Sequence[Tensor],
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Tensor,
    seq_lens: Tensor,
    stored_lens: Tensor,
    exact_rows: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    """`attend` for graphs; tensors and numbers are `SharedPlan.flatten()`'s."""
    output = torch.zeros_like(query)
    plan = SharedPlan.unflatten(tensors, numbers)
    attend(
        output, query, keys, values, plan, k_records, v_records, k_tables, v_tables, query_starts, seq_lens,
        stored_lens, exact_rows, softmax_scale,
    )  # fmt: skip
    return output


@attend_op.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k_records: Sequence[Tensor],
    v_records: Sequence[Tensor],
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Tensor,
    seq_lens: Tensor,
    stored_lens: Tensor,
    exact_rows: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    return torch.empty_like(query)
