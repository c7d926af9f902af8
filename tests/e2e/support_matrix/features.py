"""The matrix's rows. `test_support_matrix.py` has a test of each name."""

from __future__ import annotations

from tests.e2e.support_matrix.methods import METHODS

FEATURES = {
    "prefix_caching": "prefix caching",
    "chunked_prefill": "chunked prefill",
    "mixed_batches": "mixed prefill and decode batches",
    "preemption": "preemption and recomputation",
    "ngram_drafts": "n-gram speculative decoding",
    "parallel_sampling": "parallel sampling (n > 1)",
    "beam_search": "beam search",
    "openai_server": "OpenAI server",
    "bench_serve": "`vllm bench serve`",
    "torch_compile": "torch.compile",
    "tensor_parallel": "tensor parallel, two ranks",
    "sliding_window": "sliding-window layers beside compressed ones",
    "elastic_rank": "a smaller rank at start (`--kv-rank`)",
    "elastic_bits": "fewer bits at start (`--kv-bits`)",
    "lora": "LoRA adapters",
    "sleep": "sleep and wake",
}

NOT_ON_CPU = {"sleep": "Sleep mode is not supported on current platform"}
"""Features that vLLM itself refuses where these tests run, for any model."""

REFUSED = {
    (method, feature): words
    for method, entry in METHODS.items()
    for feature, words in (entry.refused | NOT_ON_CPU).items()
}
"""Words that the reason must have, by method and feature."""

CELLS = {(method, feature) for method in METHODS for feature in FEATURES}
assert set(REFUSED) <= CELLS
