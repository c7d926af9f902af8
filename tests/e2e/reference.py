"""Greedy tokens of the transformers path, for prompts whose every step is decided by a clear margin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kvcompress.serving.transformers import CompressedCache, prepare
from tests import tiny
from tests.e2e import adapter

MARGIN = 0.005
"""Required lead of the best logit over the second, in standard deviations of all logits.

Two engines round differently, and now and then a latent falls on the other side of a quantizer's threshold. On the
tiny models that moves logits by up to 0.001 standard deviations, measured by feeding one prompt whole and in chunks.
"""

CANDIDATES = 24
LONG = 8000
"""Tokens of candidates fed at a time: of long prompts there are fewer, and fewer are needed for few answers."""


def greedy(
    model_dir: Path,
    lengths: Sequence[int],
    tokens: int = 64,
    seed: int = 0,
    margin: float = MARGIN,
    lora: Path | None = None,
    **less: Any,
) -> tuple[list, list]:
    """Prompts of the given lengths and what the transformers path generates after each.

    Of up to `CANDIDATES` random prompts of each length, the one with the largest smallest margin, which must be as
    large as `margin`.
    """
    model = tiny.load_model(model_dir)
    limit_windows(model)
    if lora is not None:
        adapter.attach(model, lora)
    compressed = hasattr(model.config, "quantization_config")
    prompts, generated = [], []
    for length in lengths:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        count = min(CANDIDATES, max(4, LONG // length))
        candidates = torch.randint(2, tiny.VOCABULARY, (count, length), generator=generator)
        cache = CompressedCache.from_pretrained(model_dir, **less) if compressed else DynamicCache()
        output, found = generate(model, cache, candidates, tokens)
        best = int(found.argmax())
        assert found[best] >= margin, f"no clear prompt of {length} tokens: margin {found[best]:.4f}; change the seed"
        prompts.append(candidates[best].tolist())
        generated.append(output[best].tolist())
    return prompts, generated


@torch.no_grad()
def answers(model_dir: Path, length: int, cuts: Sequence[int], tokens: int, seed: int = 0) -> tuple[list, list[list]]:
    """A prompt whose every answer is clear, and its answers when it is fed in one step and cut at each of `cuts`.

    Of `CANDIDATES` random prompts, the one with the largest smallest margin over all ways to cut it.
    """
    model = tiny.load_model(model_dir)
    generator = torch.Generator().manual_seed(1000 * seed + length)
    candidates = torch.randint(2, model.config.vocab_size, (CANDIDATES, length), generator=generator)
    outputs, margins = [], []
    for cut in (0, *cuts):
        cache = CompressedCache.from_pretrained(model_dir)
        prepare(model, cache)
        if cut:
            model(candidates[:, :cut], past_key_values=cache, use_cache=True)
        output, margin = generate(model, cache, candidates[:, cut:], tokens)
        outputs.append(output)
        margins.append(margin)
    smallest = torch.stack(margins).amin(0)
    best = int(smallest.argmax())
    assert smallest[best] >= MARGIN, f"no clear prompt of {length} tokens; change the seed"
    return candidates[best].tolist(), [output[best].tolist() for output in outputs]


@torch.no_grad()
def score(model_dir: Path, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """The log-probability of each answer to a prompt."""
    model = tiny.load_model(model_dir)
    cache = CompressedCache.from_pretrained(model_dir)
    prepare(model, cache)
    rows_BT = torch.tensor([[*prompt, *answer] for answer in answers])
    log_probability_BTV = model(rows_BT, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    chosen_BT = log_probability_BTV[:, :-1].gather(-1, rows_BT[:, 1:, None])[..., 0]
    found: list[float] = chosen_BT[:, len(prompt) - 1 :].sum(1).tolist()
    return found


def limit_windows(model: Any) -> None:
    """Have a Llama with `layer_types` attend its windows, as vLLM's does; that of transformers attends everything."""
    config = model.config
    for index, kind in enumerate(getattr(config, "layer_types", None) or []):
        if config.model_type != "llama" or kind != "sliding_attention":
            continue

        def limit(_: Any, arguments: Any, options: dict[str, Any], index: int = index) -> tuple[Any, dict[str, Any]]:
            before, tokens = options["past_key_values"].get_seq_length(index), options["hidden_states"].shape[1]
            distance_QT = torch.arange(before, before + tokens)[:, None] - torch.arange(before + tokens)
            seen_QT = (distance_QT >= 0) & (distance_QT < config.sliding_window)
            return arguments, options | {"attention_mask": seen_QT[None, None]}

        model.model.layers[index].self_attn.register_forward_pre_hook(limit, with_kwargs=True)


@torch.no_grad()
def generate(model: torch.nn.Module, cache: Cache, prompts_BT: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Generated tokens and the smallest margin of each row."""
    step, output, margins = prompts_BT, [], []
    prepare(model, cache)
    for _ in range(tokens):
        logits = model(step, past_key_values=cache, use_cache=True).logits[:, -1]
        first, second = logits.topk(2).values.unbind(-1)
        margins.append((first - second) / logits.std(-1))
        step = logits.argmax(-1, keepdim=True)
        output.append(step)
    return torch.cat(output, 1), torch.stack(margins, 1).amin(1)
