"""One checkpoint at several ranks, in vLLM and in transformers; trained bases against principal axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.serving.loading import KV_RANK, load_codec, read_spec
from kvcompress.serving.transformers import CompressedCache
from tests import compression, require, tiny
from tests.e2e import reference, vllm_engine

pytestmark = pytest.mark.e2e

MODEL = Path(__file__).parents[2] / "assets" / "reference-model"
LENGTHS = [17, 70, 130]
TOKENS = 32


def compress(model: Path, out: Path, stages: str, samples: int = 16, length: int = 256) -> Path:
    compression.compress(model, out, stages, samples=samples, length=length)
    return out


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained bases at full rank, with other ranks in every layer after the search, 8 bits."""
    folder = tmp_path_factory.mktemp("nested")
    base = tiny.save_model(folder / "base", vocab_size=300)
    tiny.save_tokenizer(base)
    train = "rank: 0.75, steps: 6, batch: 2, samples: 8, length: 64, budget: search"
    stages = f"  - {{method: matryoshka, {train}}}\n  - {{method: scalar, bits: 8}}\n"
    return compress(base, folder / "out", stages, 8, 96)


@pytest.mark.parametrize("kv_rank", [1.0, 0.5])
def test_vllm_gives_the_transformers_tokens_at_any_rank(nested: Path, kv_rank: float) -> None:
    require.need("vllm")
    prompts, expected = reference.greedy(nested, LENGTHS, TOKENS, kv_rank=kv_rank)
    result = vllm_engine.run(nested, prompts, prompts, max_tokens=TOKENS, env={KV_RANK: str(kv_rank)})
    assert result["tokens"] == [expected, expected]
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0
    codecs = load_codec(nested, kv_rank=kv_rank)
    per_token = sum(codec.spec.bytes_per_token for codec in codecs if codec is not None)
    assert f"KV cache {per_token} bytes per token" in result["log"]


def heldout(count: int, length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return torch.tensor([[tokenizer.bos_token_id, *ids[start : start + length - 1]] for start in starts])


@torch.no_grad()
def divergences(model: torch.nn.Module, compressed: Path, tokens: torch.Tensor, shares: list[float]) -> list[float]:
    """KL(model || compressed) per token of held-out text, at shares of the stored rank."""
    target = model(tokens).logits.log_softmax(-1)
    found = []
    for share in shares:
        cache = CompressedCache.from_pretrained(compressed, kv_rank=share)
        ours = model(tokens, past_key_values=cache).logits.log_softmax(-1)
        found.append(float((target.exp() * (target - ours)).sum(-1).mean()))
    return found


def test_training_beats_principal_axes_and_loss_falls_with_rank(tmp_path: Path) -> None:
    encoding = "  - {method: scalar, bits: 16}\n"
    train = "steps: 60, batch: 4, samples: 128, length: 192"
    trained = compress(MODEL, tmp_path / "trained", f"  - {{method: matryoshka, rank: 1.0, {train}}}\n{encoding}")
    axes = compress(MODEL, tmp_path / "axes", f"  - {{method: pca, metric: none}}\n{encoding}")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    shares, tokens = [1.0, 0.75, 0.5, 0.375, 0.25], heldout(8, 384)
    ours, theirs = (divergences(model, path, tokens, shares) for path in (trained, axes))
    assert ours == sorted(ours)
    assert theirs == sorted(theirs)
    assert ours[0] < 1e-4
    assert ours[2] < 0.9 * theirs[2]


def test_the_codec_really_shrinks(nested: Path) -> None:
    import json

    spec = read_spec(json.loads((nested / "config.json").read_text()))
    full, half = load_codec(nested), load_codec(nested, kv_rank=0.5)
    assert len({layer.bytes_per_token for layer in spec.layers if layer is not None}) > 1, "the search did nothing"
    sizes = [[codec.spec.bytes_per_token for codec in codecs if codec is not None] for codecs in (full, half)]
    # A layer that the search left with the least number of channels has none to give.
    assert all(part <= whole for whole, part in zip(*sizes, strict=True))
    assert sum(sizes[1]) < 0.7 * sum(sizes[0])
