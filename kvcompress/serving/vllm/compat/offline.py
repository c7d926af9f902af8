"""An engine in this process, for evaluations: what of it has no lasting interface. Serving does not import this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sampling_params import RequestOutputKind


@dataclass(frozen=True)
class Answer:
    """A request's tokens so far."""

    request: str
    tokens: tuple[int, ...]
    finished: bool
    cached_tokens: int | None
    """Of the prompt, found in the prefix cache."""


def architectures() -> set[str]:
    """What vLLM itself can serve, as config.json names it."""
    return set(ModelRegistry.get_supported_archs())


def start(model: str, **options: Any) -> LLM:
    """An engine whose defaults do not depend on the model's generation config."""
    return LLM(model=model, generation_config="vllm", **options)


def answers(llm: LLM, prompts: Mapping[str, Sequence[int]], max_tokens: int, ends: Sequence[int]) -> Iterator[Answer]:
    """Greedy continuations, step by step, all requests at a time; `abort` ends one early.

    Args:
        prompts: by names that the engine has not had before.
        ends: tokens that end a continuation.
    """
    # The engine is stepped by hand, so that a continuation can be ended by what its text contains.
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=list(ends),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    engine = llm.llm_engine
    rendered = engine.renderer.render_cmpl([{"prompt_token_ids": list(prompt)} for prompt in prompts.values()])
    for name, prompt in zip(prompts, rendered, strict=True):
        engine.add_request(name, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = tuple(output.outputs[0].token_ids)
            yield Answer(output.request_id, tokens, output.finished, output.num_cached_tokens)


def abort(llm: LLM, request: str) -> None:
    """End a request; it may still give an answer."""
    llm.llm_engine.abort_request([request])


def prompt_scores(llm: LLM, tokens: Sequence[int]) -> tuple[list[float], list[int]]:
    """Of every token of a text but the first: its log-probability, and the token that was most probable."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    entries = llm.generate([{"prompt_token_ids": list(tokens)}], params, use_tqdm=False)[0].prompt_logprobs[1:]
    log_probs = [row[token].logprob for row, token in zip(entries, tokens[1:], strict=True)]
    return log_probs, [next(token for token, entry in row.items() if entry.rank == 1) for row in entries]


def capacity_tokens(llm: LLM) -> int:
    """Cache blocks times block size, as the engine settled them at start-up."""
    cache = llm.llm_engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks) * int(cache.block_size)


def clean_up() -> None:
    """Once nothing refers to an engine any more: free what it has left in this process."""
    cleanup_dist_env_and_memory()
