"""What vLLM says about itself, without a vLLM that says it."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvcompress.serving.vllm import compat
from tests import tiny


def engine(**changes: Any) -> compat.Engine:
    """An engine with nothing special on the CPU, but for changes."""
    plain = {
        "model": "",
        "revision": None,
        "download_dir": None,
        "load_format": "auto",
        "dtype": torch.float32,
        "vocab_size": 256,
        "max_model_len": 512,
        "num_layers": tiny.NUM_LAYERS,
        "num_kv_heads": tiny.NUM_KV_HEADS,
        "text_config": None,
        "uses_mla": False,
        "device": torch.device("cpu"),
        "cache_dtype": "auto",
        "block_size": 32,
        "block_size_chosen": False,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "ubatching": False,
        "speculative_tokens": 0,
        "hybrid_manager": True,
        "transfers_cache": False,
        "number": 0,
        "config": SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})),
    }
    assert plain.keys() == {field.name for field in fields(compat.Engine)}
    return compat.Engine(**{**plain, **changes})


def layer(heads: int, kv_heads: int, head_dim: int, index: int = 0, cache: Tensor | None = None) -> compat.Layer:
    """An ordinary attention layer that vLLM has not given an implementation yet."""
    name = f"layers.{index}.attn"
    return compat.Layer(name, heads, kv_heads, head_dim, head_dim**-0.5, None, (), SimpleNamespace(kv_cache=cache))


def batch(starts: Tensor, lengths: Tensor, slots: Tensor, table: Tensor, max_query_len: int, **changes: Any) -> Any:
    """A step as vLLM's runner describes it, where host and device are one."""
    found = {
        "causal": True,
        "num_reqs": len(lengths),
        "num_actual_tokens": len(slots),
        "max_query_len": max_query_len,
        "slot_mapping": slots,
        "block_table_tensor": table,
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths,
    }
    return SimpleNamespace(**{**found, **changes})
