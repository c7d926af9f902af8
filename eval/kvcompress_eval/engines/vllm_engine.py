"""vLLM as the engine, offline and in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.codec.groups import of_group
from kvcompress.codec.nested import WIDEST
from kvcompress_eval.engines.base import Generation, Scores, contains_all
from kvcompress_eval.models import codec_spec, end_tokens, is_compressed, read_config
from kvcompress_eval.tokenizer import TextTokenizer

# Set only where the caller has not: one process starts in seconds, one GiB holds any prompt of a small model, and
# threads bound to cores would stay bound for whatever runs in this process afterwards.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmEngine:
    """vLLM's `LLM`, greedy.

    Args:
        model: folder of a plain or compressed checkpoint.
        max_context: longest prompt plus continuation in tokens.
        dtype: torch dtype name, or auto.
        kv_rank: share of a compressed model's stored channels to use.
        kv_bits: the most bits in which it stores a channel.
        options: further arguments of `vllm.LLM`.
    """

    name = "vllm"
    batch_size = 32
    vocabulary = None

    def __init__(
        self,
        model: Path,
        tokenizer: TextTokenizer,
        *,
        max_context: int,
        dtype: str = "auto",
        kv_rank: float = 1.0,
        kv_bits: int = WIDEST,
        **options: Any,
    ) -> None:
        from kvcompress.serving.loading import ask_for

        ask_for(kv_rank, kv_bits)
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        try:
            from kvcompress.serving.vllm.compat import offline
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"engine vllm needs vLLM installed, and importing it failed: {error}") from error
        import torch

        if is_compressed(model):
            # vLLM finds the plug-in by itself where kvcompress is installed; a source checkout is not.
            from kvcompress.serving.vllm import register

            register()
        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        spec = codec_spec(read_config(model))
        self._exact_steps = spec is not None and any(map(of_group, spec.layers))
        self._tokenizer = tokenizer
        self._ends = end_tokens(model, tokenizer)
        arguments = {
            "enforce_eager": not torch.cuda.is_available(),
            "max_num_seqs": self.batch_size,
            "disable_log_stats": True,
            **options,
        }
        self._offline = offline
        self._llm: Any = offline.start(str(model), dtype=dtype, max_model_len=max_context, **arguments)
        self._requests = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        ends = set() if ignore_end else self._ends
        names = [f"eval-{self._requests + index}" for index in range(len(prompts))]
        self._requests += len(prompts)
        position = {name: index for index, name in enumerate(names)}
        done: list[Generation | None] = [None] * len(prompts)
        given = dict(zip(names, prompts, strict=True))
        for answer in self._offline.answers(self._llm, given, max_tokens, sorted(ends)):
            index = position[answer.request]
            if done[index] is not None:
                continue
            tokens = [token for token in answer.tokens if token not in ends]
            text = self._tokenizer.decode(tokens)
            found = bool(until and until[index]) and contains_all(text, until[index] if until else ())
            if answer.finished or found:
                done[index] = Generation(tuple(tokens), text, answer.cached_tokens)
                if answered is not None:
                    answered(len(done) - done.count(None))
            if found and not answer.finished:
                self._offline.abort(self._llm, answer.request)
        assert all(item is not None for item in done), "vLLM dropped a request"
        return [item for item in done if item is not None]

    def score(self, tokens: Sequence[int], *, distribution: bool = False, rows: Sequence[int] | None = None) -> Scores:
        if distribution:
            raise ValueError("vLLM gives no whole distributions; use engine transformers for the KL divergence")
        if self._exact_steps:
            raise ValueError(
                "layers of this model share latents, so vLLM scores a prompt with an exact cache and would hide the "
                "loss; use engine transformers for perplexity and agreement"
            )
        log_probs, top1 = self._offline.prompt_scores(self._llm, tokens)
        return Scores(np.asarray(log_probs, np.float32), np.asarray(top1, np.int64))

    def capacity_tokens(self) -> int | None:
        return self._offline.capacity_tokens(self._llm)

    def close(self) -> None:
        import gc

        del self._llm
        gc.collect()
        self._offline.clean_up()
