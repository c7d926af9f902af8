"""The transformers path fed in exactly the steps that an engine took: for codecs whose answers depend on the steps.

Every request has a cache of its own, which grows by what the engine scheduled. Where a request starts from the prefix
cache or again after preemption, its cache is that of the request which had computed those tokens, cut to them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvcompress.serving.transformers import CompressedCache, prepare
from tests import tiny
from tests.e2e.engine_steps import Row


@torch.no_grad()
def lags(model_dir: Path, rows: Sequence[Sequence[Row]], texts: Mapping[str, tuple[list[int], list[int]]]) -> list:
    """By how much each generated token's logit stays behind the best, in standard deviations: 0 where it is the best.

    Args:
        rows: what the engine scheduled, by step; no drafts.
        texts: prompt and answer of each request, no two prompts with a block in common.
    """
    model, found = tiny.load_model(model_dir), []
    caches: dict[str, Any] = {}
    computed: dict[tuple[int, ...], Any] = {}
    known = {name: len(prompt) for name, (prompt, _) in texts.items()}
    for name, before, count, length in (request for row in rows for request in row):
        prompt, answer = texts[name]
        assert len(prompt) == length <= known[name]
        cache = caches.get(name)
        if cache is None or cache.get_seq_length() != before:
            cache = copy.deepcopy(computed[tuple(prompt)]) if before else CompressedCache.from_pretrained(model_dir)
            if before:
                cache.crop(before)
            prepare(model, cache)
        step = (prompt + answer)[before : before + count]
        assert len(step) == count
        logits_V = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1]
        caches[name] = computed[tuple(prompt)] = cache
        # The engine samples when a step reaches a request's end, not while it computes its tokens again.
        if before + count == known[name]:
            chosen = answer[known[name] - length]
            found.append(float((logits_V.max() - logits_V[chosen]) / logits_V.std()))
            known[name] += 1
    return found
