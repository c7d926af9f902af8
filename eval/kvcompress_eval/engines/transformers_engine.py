"""Hugging Face transformers as the engine: plain models, and compressed ones through `CompressedCache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvcompress.codec.nested import WIDEST
from kvcompress.families import family_of
from kvcompress_eval.engines.base import Generation, Scores, contains_all
from kvcompress_eval.models import end_tokens, is_compressed, read_config
from kvcompress_eval.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from torch import Tensor

PREFILL_CHUNK = 2048
"""Tokens per forward pass of a prompt. Bounds memory; results do not depend on it, unless layers share latents."""


class TransformersEngine:
    """Batch size 1, greedy.

    Args:
        model: folder of a plain or compressed checkpoint.
        dtype: torch dtype name, or auto: the checkpoint's on an accelerator, and float32 on a CPU, which is
            slow in bfloat16.
        device: torch device, or auto.
        cache: a cache of `baseline_caches` for a plain model, to compare with.
        kv_rank: share of a compressed model's stored channels to use.
        kv_bits: the most bits in which it stores a channel.
    """

    name = "transformers"
    batch_size = 1

    def __init__(
        self,
        model: Path,
        tokenizer: TextTokenizer,
        *,
        dtype: str = "auto",
        device: str = "auto",
        cache: str | None = None,
        kv_rank: float = 1.0,
        kv_bits: int = WIDEST,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import kvcompress.serving.transformers  # noqa: F401  # so that transformers reads compressed checkpoints

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        self._tokenizer = tokenizer
        self._new_empty_cache = cache_factory(model, cache, kv_rank, kv_bits)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
        self._model.to(device).eval()
        self._ends: AbstractSet[int] = end_tokens(model, tokenizer)

    @property
    def vocabulary(self) -> int:
        return int(self._model.get_output_embeddings().weight.shape[0])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        wanted = until or [()] * len(prompts)
        ends = set() if ignore_end else self._ends
        made: list[Generation] = []
        for prompt, texts in zip(prompts, wanted, strict=True):
            made.append(self._continue(prompt, max_tokens, texts, ends))
            if answered is not None:
                answered(len(made))
        return made

    def _continue(
        self, prompt: Sequence[int], max_tokens: int, wanted: Sequence[str], ends: AbstractSet[int]
    ) -> Generation:
        cache = self._new_cache()
        made: list[int] = []
        text = ""
        next_token = int(self._forward(prompt, cache, last_only=True)[-1].argmax())
        while next_token not in ends:
            made.append(next_token)
            text = self._tokenizer.decode(made)
            if len(made) == max_tokens or (wanted and contains_all(text, wanted)):
                break
            next_token = int(self._forward([next_token], cache, last_only=True)[-1].argmax())
        return Generation(tuple(made), text)

    def next_log_probs(self, prompt: Sequence[int], made: Sequence[int]) -> NDArray[np.float32]:
        """Log probabilities [V] of the token after a prompt and what was generated, in the steps `generate` takes."""
        cache = self._new_cache()
        logits_1V = self._forward(prompt, cache, last_only=True)
        for token in made:
            logits_1V = self._forward([token], cache, last_only=True)
        log_probs_V: NDArray[np.float32] = logits_1V[0].float().log_softmax(-1).cpu().numpy()
        return log_probs_V

    @contextmanager
    def disturbed(self, error: float, seed: int) -> Iterator[None]:
        """While it lasts, what every attention layer computes is off by this relative error, at random."""
        import torch

        random = torch.Generator(self._model.device).manual_seed(seed)

        def disturb(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            noise = torch.randn(inputs[0].shape, generator=random, device=inputs[0].device, dtype=inputs[0].dtype)
            return (inputs[0] + error * inputs[0].square().mean(-1, keepdim=True).sqrt() * noise, *inputs[1:])

        names = family_of({"architectures": [type(self._model).__name__]}).names
        layers = [module for name, module in self._model.named_modules() if name.endswith(f".{names.o}")]
        assert layers, "attention ends in an output projection"
        hooks = [layer.register_forward_pre_hook(disturb) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def score(self, tokens: Sequence[int], *, distribution: bool = False, rows: Sequence[int] | None = None) -> Scores:
        import torch

        log_probs, top1, distributions = [], [], []
        cache = self._new_cache()
        start = 0
        for size in _scoring_steps(cache, len(tokens) - 1):
            chunk = tokens[start : start + size]
            logits_TV = self._forward(chunk, cache).float()
            follow_T = torch.tensor(tokens[start + 1 : start + 1 + len(chunk)], device=logits_TV.device)
            log_probs_TV = logits_TV.log_softmax(-1)
            log_probs.append(log_probs_TV.gather(1, follow_T[:, None])[:, 0].cpu().numpy())
            top1.append(logits_TV.argmax(-1).cpu().numpy())
            if distribution:
                wanted = (
                    slice(None) if rows is None else [at - start for at in rows if start <= at < start + len(chunk)]
                )
                distributions.append(log_probs_TV[wanted].cpu().numpy())
            start += size
        return Scores(
            np.concatenate(log_probs), np.concatenate(top1), np.concatenate(distributions) if distribution else None
        )

    def _new_cache(self) -> Any:
        from kvcompress.serving.transformers import prepare

        cache = self._new_empty_cache()
        prepare(self._model, cache)
        return cache

    def _forward(self, tokens: Sequence[int], cache: Any, *, last_only: bool = False) -> Tensor:
        """Append tokens to the cache in chunks; logits [T, V], or [1, V] of the last token."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(tokens), PREFILL_CHUNK):
                chunk = torch.tensor([tokens[start : start + PREFILL_CHUNK]], device=self._model.device)
                keep = 1 if last_only else 0
                out = self._model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=keep)
                parts.append(out.logits[0])
            return parts[-1] if last_only else torch.cat(parts)

    def capacity_tokens(self) -> int | None:
        return None

    def close(self) -> None:
        import gc

        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _scoring_steps(cache: Any, tokens: int) -> list[int]:
    """Sizes of the forward passes in which to score a text, such that the cache's loss shows in every score."""
    if hasattr(cache, "scoring_steps"):
        steps: list[int] = cache.scoring_steps(tokens, PREFILL_CHUNK)
        return steps
    return [min(PREFILL_CHUNK, tokens - start) for start in range(0, tokens, PREFILL_CHUNK)]


def cache_factory(
    model: Path, baseline: str | None = None, kv_rank: float = 1.0, kv_bits: int = WIDEST
) -> Callable[[], Any]:
    """A function that makes an empty cache for one sequence.

    Raises:
        ValueError: an unknown baseline cache, or one for a model that has a codec.
    """
    if baseline is not None:
        if is_compressed(model):
            raise ValueError(f"{model} has a codec of its own; cache {baseline} is for plain models")
        from kvcompress_eval.engines import baseline_caches

        return baseline_caches.cache_factory(baseline, int(read_config(model)["num_hidden_layers"]))
    if not is_compressed(model):
        from transformers import DynamicCache

        return lambda: DynamicCache()
    from kvcompress.serving.loading import load_codec
    from kvcompress.serving.transformers import CompressedCache

    codecs = load_codec(model, kv_rank=kv_rank, kv_bits=kv_bits)
    return lambda: CompressedCache(codecs)
