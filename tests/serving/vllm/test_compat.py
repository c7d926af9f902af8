"""What vLLM's own objects become at the customs house."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import require, tiny

require.need("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvcompress.serving.vllm import compat


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = str(tiny.save_model(tmp_path_factory.mktemp("model")))

    def made(**options: Any) -> compat.Engine:
        return compat.Engine.of(EngineArgs(model=model, max_model_len=256, **options).create_engine_config())

    return made


def test_a_plain_engine(engine_of: Any) -> None:
    found = engine_of()
    assert Path(found.model).is_dir()
    assert (found.num_layers, found.num_kv_heads) == (tiny.NUM_LAYERS, tiny.NUM_KV_HEADS)
    assert found.text_config.num_hidden_layers == tiny.NUM_LAYERS
    assert (found.max_model_len, found.vocab_size) == (256, found.text_config.vocab_size)
    assert (found.cache_dtype, found.load_format, found.device.type) == ("auto", "auto", "cpu")
    assert not found.block_size_chosen
    assert not found.uses_mla
    assert not found.ubatching
    assert not found.transfers_cache
    assert (found.tensor_parallel_size, found.pipeline_parallel_size) == (1, 1)
    assert (found.decode_context_parallel_size, found.prefill_context_parallel_size) == (1, 1)
    assert (found.number, found.speculative_tokens, found.revision, found.download_dir) == (0, 0, None, None)
    # vLLM keeps caches of different kinds only where all of them may have it.
    assert engine_of(disable_hybrid_kv_cache_manager=False).hybrid_manager


def test_what_an_operator_asks_for(engine_of: Any) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    asked = {"block_size": 64, "dtype": "bfloat16", "load_format": "dummy", "revision": "v2", "download_dir": "here"}
    found = engine_of(speculative_config=drafts, disable_hybrid_kv_cache_manager=True, **asked)
    assert (found.block_size, found.block_size_chosen, found.dtype) == (64, True, torch.bfloat16)
    assert (found.load_format, found.revision, found.download_dir) == ("dummy", "v2", "here")
    assert found.speculative_tokens == 3
    assert not found.hybrid_manager


def test_a_step() -> None:
    starts, lengths = torch.tensor([0, 1, 4, 4], dtype=torch.int32), torch.tensor([9, 3, 0], dtype=torch.int32)
    described = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        num_reqs=2,
        num_actual_tokens=4,
        max_query_len=3,
        max_seq_len=9,
        block_table_tensor=torch.tensor([[5, 6], [7, 0]]),
        slot_mapping=torch.arange(4),
        seq_lens_cpu_upper_bound=lengths.clone(),
    )
    step = compat.Batch.of(described)
    assert (step.requests, step.tokens, step.max_queries) == (2, 4, 3)
    assert step.query_starts.data_ptr() == starts.data_ptr(), "a captured graph reads the runner's own tensors"
    assert step.query_starts.tolist() == step.host_query_starts.tolist() == [0, 1, 4]
    assert step.seq_lens.tolist() == [9, 3]
    assert step.host_seq_lens is not None
    assert step.block_table_RN.tolist() == [[5, 6], [7, 0]]
    assert step.slots_T.tolist() == [0, 1, 2, 3]
    described.causal = False
    with pytest.raises(AssertionError, match="causal decoder layers"):
        compat.Batch.of(described)
