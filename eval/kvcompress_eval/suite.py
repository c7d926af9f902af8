"""Suites: which tasks, at which lengths, on how many samples. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress_eval.tasks.catalogue import INFINITEBENCH, LONGBENCH, MRCR
from kvcompress_eval.tasks.ruler.registry import ALL, OFFICIAL, SYNTHETIC

LONG = (4096, 8192, 16384, 32768)
AUTO = "auto"
LONGBENCH_SAMPLES = 503
"""No file of LongBench, v1 or v2, has more records."""
NEED_JIEBA = ("longbench_multifieldqa_zh", "longbench_dureader", "longbench_vcsum")


@dataclass(frozen=True)
class Suite:
    """One suite. Lengths in tokens, generated ones included; a part with zero tokens or prompts is left out.

    Without lengths, tasks from files get as much room as the models have.
    """

    summary: str
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 0
    """Per task and length."""
    text_tokens: int = 0
    """Of held-out text, shared evenly by its kinds, for perplexity and, with a baseline, agreement."""
    window: int = 1024
    stride: int = 512
    """Tokens of a window, after the first one of a kind, that are new and count."""
    template: str = "base"
    """Around prompts, where the user names none: base, chat, or chat only where the tokenizer has a template (auto)."""
    agreement_prompts: int = 0
    """Task prompts, taken from all tasks in turn."""
    agreement_new_tokens: int = 64
    drift_prompts: int = 0
    """Pieces of held-out text, of `drift_context` tokens each, which the baseline continues by `drift_tokens`."""
    drift_context: int = 128
    drift_tokens: int = 0


SUITES: dict[str, Suite] = {
    "quick": Suite(
        summary="four retrieval tasks, and text of six kinds; minutes for a small model on two cores",
        tasks=("niah_single_1", "niah_noise_multikey", "niah_multikey_2", "niah_noise_multivalue"),
        lengths=(512,),
        samples=8,
        text_tokens=6144,
        stride=1024,
        template=AUTO,
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
        text_tokens=32768,
    ),
    "longbench": Suite(
        summary="the 21 data sets of LongBench, from their files; three need jieba",
        tasks=tuple(name for name in LONGBENCH if not name.startswith("longbench_e_")),
        samples=LONGBENCH_SAMPLES,
    ),
    "longbench-no-jieba": Suite(
        summary="LongBench without the three data sets whose metric needs jieba",
        tasks=tuple(name for name in LONGBENCH if not name.startswith(("longbench_e_", *NEED_JIEBA))),
        samples=LONGBENCH_SAMPLES,
    ),
    "longbench-e": Suite(
        summary="the 13 data sets of LongBench-E, broken down by length",
        tasks=tuple(name for name in LONGBENCH if name.startswith("longbench_e_")),
        samples=LONGBENCH_SAMPLES,
    ),
    "longbench2": Suite(summary="LongBench v2, answered directly", tasks=("longbench2",), samples=LONGBENCH_SAMPLES),
    "longbench2-cot": Suite(
        summary="LongBench v2, answered after a chain of thought", tasks=("longbench2_cot",), samples=LONGBENCH_SAMPLES
    ),
    "infinitebench": Suite(
        summary="the tasks of InfiniteBench that can be generated",
        tasks=tuple(INFINITEBENCH),
        lengths=LONG,
        samples=100,
    ),
    "needle-grid": Suite(
        summary="one needle at eleven depths of several lengths", tasks=("needle_grid",), lengths=LONG, samples=110
    ),
    "mrcr": Suite(
        summary="one of several equal requests of a conversation, asked for again",
        tasks=tuple(MRCR),
        lengths=LONG,
        samples=100,
    ),
    "multi-turn": Suite(
        summary="a second question on a context that the cache holds", tasks=("multi_turn",), lengths=LONG, samples=100
    ),
    "drift": Suite(
        summary="agreement by position in a long generation of the baseline; needs a baseline",
        drift_prompts=4,
        drift_tokens=2048,
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
