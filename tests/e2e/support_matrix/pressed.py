"""One engine that is short of everything: small steps, a pool too small, drafts, then sampling and beam search.

`run` is called in a process of its own (`vllm_engine.in_child`).
"""

from __future__ import annotations

from typing import Any

from tests.e2e.engine_steps import Steps

SAMPLES, BEAMS, SHORT = 3, 2, 8
"""Answers to one prompt in parallel, beams, and the tokens of either."""


def run(engine: dict[str, Any], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Greedy answers in two passes, what happened meanwhile, and sampled answers with their log-probabilities."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(**engine)
    steps = Steps.of(llm)
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    passes = [llm.generate(inputs, greedy, use_tqdm=False) for _ in range(2)]
    found = {
        "tokens": [[list(output.outputs[0].token_ids) for output in one] for one in passes],
        "cached": [[output.num_cached_tokens for output in one] for one in passes],
        "metrics": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
        "chunks": steps.chunks,
        "mixed": steps.mixed,
    }
    sampling = SamplingParams(
        n=SAMPLES, temperature=1, seed=7, max_tokens=SHORT, ignore_eos=True, detokenize=False, logprobs=0
    )
    (sampled,) = llm.generate(inputs[-1:], sampling, use_tqdm=False)
    (beams,) = llm.beam_search(inputs[-1:], BeamSearchParams(beam_width=BEAMS, max_tokens=SHORT, ignore_eos=True))
    return found | {
        "samples": [(list(one.token_ids), one.cumulative_logprob) for one in sampled.outputs],
        "beams": [(one.tokens[len(prompts[-1]) :], one.cum_logprob) for one in beams.sequences],
    }
