"""A prompt that begins with blocks which another request of the same step is about to fill: vLLM schedules that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcompress.serving.transformers import CompressedCache
from tests import require, tiny
from tests.e2e import reference, vllm_engine
from tests.e2e.method_recipes import LOSSY, compress

require.need("vllm")
pytestmark = pytest.mark.e2e

TOKENS, BLOCK = 16, vllm_engine.ENGINE["block_size"]
SHARED, LENGTH = 2 * BLOCK, 2 * BLOCK + 11


@pytest.mark.parametrize("method", ["scalar", "xkv", "gear", "transmla"])
def test_both_requests_get_the_answers_of_a_prompt_read_whole(method: str, base_model: Path, tmp_path: Path) -> None:
    model = compress(base_model, tmp_path, LOSSY[method])
    prompts, expected = clear_prompts(model)
    served = vllm_engine.run(model, prompts, max_tokens=TOKENS)
    assert served["cached"] == [[0, SHARED]], "the second request took the first one's blocks while it filled them"
    assert served["tokens"] == [expected]


def clear_prompts(model_dir: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Two prompts with the same first `SHARED` tokens and clear answers, and these."""
    model = tiny.load_model(model_dir)
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(2, model.config.vocab_size, (1, SHARED), generator=generator)
    rest = torch.randint(2, model.config.vocab_size, (reference.CANDIDATES, LENGTH - SHARED), generator=generator)
    candidates = torch.cat([start.expand(len(rest), -1), rest], 1)
    tokens, margins = reference.generate(model, CompressedCache.from_pretrained(model_dir), candidates, TOKENS)
    best = margins.argsort(descending=True)[:2]
    assert float(margins[best].min()) >= reference.MARGIN, "no two clear prompts; change the seed"
    return candidates[best].tolist(), tokens[best].tolist()
