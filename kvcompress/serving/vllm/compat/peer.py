"""vLLM's own attention on a CPU, outside an engine, for benchmarks to compare with. Serving does not import this."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa


def decode_step(
    output_THD: Tensor, query_THD: Tensor, table_RN: Tensor, lengths_R: Tensor, kv_heads: int, block_size: int
) -> Callable[[Tensor], None]:
    """One token of every request attends, on the cache `[blocks, KV heads, 2 block_size, head_dim]` that is passed.

    What vLLM makes once per step for all layers is made here.
    """
    current_platform.import_kernels()
    requests, heads, head_dim = query_THD.shape
    starts_R = torch.arange(requests + 1, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=requests,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        seq_lens=lengths_R,
        dtype=query_THD.dtype,
        query_start_loc=starts_R,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(query_THD.dtype, block_size, head_dim),
        enable_kv_split=True,
    )

    def step(cache: Tensor) -> None:
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query_THD,
            key_cache=keys,
            value_cache=values,
            output=output_THD,
            query_start_loc=starts_R,
            seq_lens=lengths_R,
            scale=head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table_RN,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return step
