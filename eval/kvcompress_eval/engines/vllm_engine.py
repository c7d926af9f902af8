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
            from vllm import LLM
        except ImportError as error:
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
            "generation_config": "vllm",  # whose end tokens are read above
            **options,
        }
        self._llm: Any = LLM(model=str(model), dtype=dtype, max_model_len=max_context, **arguments)
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
        # The engine is stepped by hand, so that a continuation can be ended by what its text contains.
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ends = set() if ignore_end else self._ends
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=sorted(ends),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        engine = self._llm.llm_engine
        rendered = engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt)} for prompt in prompts])
        position = {f"eval-{self._requests + index}": index for index in range(len(prompts))}
        self._requests += len(prompts)
        for key, prompt in zip(position, rendered, strict=True):
            engine.add_request(key, prompt, params)
        done: list[Generation | None] = [None] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = position[output.request_id]
                if done[index] is not None:
                    continue
                tokens = [token for token in output.outputs[0].token_ids if token not in ends]
                text = self._tokenizer.decode(tokens)
                found = bool(until and until[index]) and contains_all(text, until[index] if until else ())
                if output.finished or found:
                    done[index] = Generation(tuple(tokens), text, output.num_cached_tokens)
                    if answered is not None:
                        answered(len(done) - done.count(None))
                if found and not output.finished:
                    engine.abort_request([output.request_id])
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
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompt = {"prompt_token_ids": list(tokens)}
        entries = self._llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs[1:]
        log_probs = [row[token].logprob for row, token in zip(entries, tokens[1:], strict=True)]
        top1 = [next(token for token, entry in row.items() if entry.rank == 1) for row in entries]
        return Scores(np.asarray(log_probs, np.float32), np.asarray(top1, np.int64))

    def capacity_tokens(self) -> int | None:
        """Cache blocks times block size, as the engine settled them at start-up."""
        config = self._llm.llm_engine.vllm_config.cache_config
        return int(config.num_gpu_blocks) * int(config.block_size)

    def close(self) -> None:
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
