"""Suites: which tasks, at which lengths, on how many samples. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress_eval.tasks.ruler.registry import ALL, OFFICIAL, SYNTHETIC


@dataclass(frozen=True)
class Suite:
    """One suite. Lengths in tokens, generated ones included; a part with zero tokens or prompts is left out."""

    summary: str
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 0
    """Per task and length."""
    perplexity_tokens: int = 0
    window: int = 1024
    stride: int = 512
    agreement_windows: int = 0
    """Windows of held-out text, of `stride` tokens each."""
    agreement_prompts: int = 0
    """Task prompts, taken from all tasks in turn."""
    agreement_new_tokens: int = 64


SUITES: dict[str, Suite] = {
    "quick": Suite(
        summary="five retrieval tasks, perplexity and agreement; minutes for a small model on two cores",
        tasks=("niah_single_1", "niah_noise_multikey", "niah_noise_multivalue", "niah_noise_multiquery", "vt_2hop"),
        lengths=(1024,),
        samples=20,
        perplexity_tokens=8192,
        agreement_windows=4,
        agreement_prompts=5,
        agreement_new_tokens=32,
    ),
    "ruler": Suite(
        summary="the six RULER tasks that need no download, as the benchmark defines them",
        tasks=tuple(OFFICIAL),
        lengths=(4096,),
        samples=500,
    ),
    "ruler-syn": Suite(
        summary="those six and RULER's five essay tasks on generated prose, named apart because scores differ",
        tasks=(*OFFICIAL, *SYNTHETIC),
        lengths=(4096,),
        samples=500,
    ),
    "ruler-13": Suite(
        summary="all thirteen RULER tasks; needs --essay, --squad and --hotpotqa",
        tasks=tuple(ALL),
        lengths=(4096,),
        samples=500,
    ),
    "needle-ref": Suite(
        summary="the tasks that the bundled reference model is held to",
        tasks=(
            "niah_single_1",
            "niah_noise_multikey",
            "niah_noise_multivalue",
            "niah_noise_multiquery",
            "niah_multikey_2",
            "vt_2hop",
        ),
        lengths=(1024,),
        samples=100,
    ),
    "text": Suite(
        summary="perplexity and agreement on held-out text only",
        perplexity_tokens=32768,
        agreement_windows=16,
    ),
}


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    return SUITES[name]
