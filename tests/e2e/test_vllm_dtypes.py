"""Engines in sixteen bits, as most checkpoints are served: where a method cuts nothing, only that rounding is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import require
from tests.e2e import vllm_engine
from tests.e2e.method_recipes import LOSSLESS, compress_nothing

require.need("vllm")
pytestmark = pytest.mark.e2e

STEP = 24
PROMPTS = [list(range(5, 5 + length)) for length in (3, 3 * STEP + 1, 5 * STEP + 1)]
"""Fed in chunks, the last of them a single token."""


def logits(model: Path, dtype: str) -> torch.Tensor:
    """Of the token after each prompt, twice, the second time from the prefix cache `[passes, prompts, vocabulary]`."""
    served = vllm_engine.run(
        model, PROMPTS, PROMPTS, max_tokens=1, max_num_batched_tokens=STEP, logits=True, dtype=dtype
    )
    assert served["metrics"]["vllm:prefix_cache_hits"] > 0
    return torch.tensor(served["logits"])[:, :, 0]


@pytest.fixture(scope="module")
def exact(base_model: Path) -> torch.Tensor:
    return logits(base_model, "float32")


IN_MAKE_TEST = ("xkv", "gear")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *(pytest.param(name, "bfloat16", marks=[pytest.mark.slow] * (name not in IN_MAKE_TEST)) for name in LOSSLESS),
        pytest.param("pca", "float16", marks=pytest.mark.slow),
        pytest.param("xkv", "float16", marks=pytest.mark.slow),
    ],
)
def test_sixteen_bits_cost_what_they_cost_the_base_model(
    method: str,
    dtype: str,
    base_model: Path,
    exact: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = compress_nothing(method, base_model, tmp_path, monkeypatch)
    ours = (logits(model, dtype) - exact).square().mean().sqrt()
    base = (logits(base_model, dtype) - exact).square().mean().sqrt()
    print(f"{method} in {dtype}: {ours:.5f}, base model {base:.5f}")
    assert 0 < ours < 2 * base
