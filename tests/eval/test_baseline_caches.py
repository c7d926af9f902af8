"""Integer caches to compare with: rounding as stated, tokens independent, bytes as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kvcompress_eval.engines import open_engine
from kvcompress_eval.engines.baseline_caches import BITS, bytes_per_token, cache_factory, round_trip
from kvcompress_eval.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> TextTokenizer:
    return TextTokenizer(base)


@pytest.mark.parametrize("bits", BITS.values())
def test_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    error = (round_trip(x, bits) - x).abs().amax(-1)
    # Scale and zero point are halves, which adds a little at the upper end.
    assert (error <= 0.5 * step + 4e-3 * x.abs().amax(-1)).all()
    assert (error > 0.3 * step).float().mean() > 0.9


def test_tokens_do_not_depend_on_each_other() -> None:
    x = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_trip(x, 4)[:, :, 3:4], round_trip(x[:, :, 3:4], 4))
    assert torch.equal(round_trip(torch.full((1, 1, 1, 8), 2.5), 2), torch.full((1, 1, 1, 8), 2.5))


def test_bytes() -> None:
    assert bytes_per_token("int4", 8, 2, 64) == 8 * 2 * 2 * (32 + 4)


def test_engine_runs_with_one(base: Path, tokenizer: TextTokenizer) -> None:
    exact, fine, coarse = (
        open_engine("transformers", base, tokenizer, max_context=64, **options).score(list(range(5, 60)))
        for options in ({}, {"cache": "int8"}, {"cache": "int2"})
    )
    near, far = (abs(scores.log_probs_T - exact.log_probs_T).mean() for scores in (fine, coarse))
    assert 0 < near < far


def test_unknown_cache_is_refused(compressed: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="unknown cache 'int3'; expected one of int8, int4, int2"):
        cache_factory("int3", 4)
    with pytest.raises(ValueError, match="codec of its own"):
        open_engine("transformers", compressed, tokenizer, max_context=64, cache="int4")
