"""The shape of results.json, for those who read it by program. `docs/results.schema.json` is made from this.

`python -m kvcompress_eval.schema` prints the JSON schema. Scores, differences and their intervals are in points (0 to
100); intervals are of 95 %; `None` where a model has no such figure (the baseline has no difference to itself).
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float]
Verdict = Literal["not worse", "worse", "undecided"]


class Row(BaseModel):
    """Base of all: a field that is not listed is an error."""

    model_config = ConfigDict(extra="forbid")


class Layer(Row):
    """Relative error of one layer's attention output on calibration text; None where it was left as it is."""

    index: int
    both: float | None
    k: float | None
    v: float | None


class Model(Row):
    name: str
    path: str
    role: Literal["baseline", "candidate"]
    bytes_per_token: float | None = Field(description="KV cache, all layers, every scale and gain counted")
    manifest_sha256: str | None
    fingerprint: str
    recipe: dict[str, Any] | None
    layers: list[Layer]


class Compared(Row):
    """A score, and the paired comparison with the baseline."""

    model: str
    score: float
    n: int
    ci95: Interval
    delta: float | None = Field(description="mean of candidate minus baseline over the same samples")
    delta_ci95: Interval | None = Field(description="Tango's score interval, not adjusted for other comparisons")
    delta_bootstrap95: Interval | None
    better: int | None
    worse: int | None
    mcnemar_p: float | None = Field(description="exact, two-sided")
    p_not_worse: float | None = Field(description="one-sided, against a loss of the margin or more")
    p_worse: float | None = Field(description="one-sided, against no loss")
    verdict: Verdict | None = Field(description="adjusted for its family, see multiplicity")


class Task(Compared):
    task: str
    length: int
    mean_length: float


class Multiplicity(Row):
    method: str
    alpha: float = Field(description="chance that any verdict of a family is wrong")
    overall: int = Field(description="verdicts of the family over all tasks: candidates")
    tasks: int = Field(description="verdicts of the family of single tasks")


class Pair(Row):
    scores: tuple[float, float]
    delta: float


class OverallPair(Pair):
    ci95: Interval


class TaskPair(Pair):
    task: str
    length: int


class NoiseFloor(Row):
    """The baseline against itself on prompts of the next seed."""

    model: str
    seeds: tuple[int, int]
    overall: OverallPair
    rms: float = Field(description="root mean square of the tasks' differences")
    tasks: list[TaskPair]


class Depth(Row):
    task: str
    length: int
    model: str
    depth: float = Field(description="where the answer stands in the prompt, 0 to 100")
    score: float
    n: int


class Part(Row):
    """Scores of the samples of a task that have one detail in common."""

    task: str
    length: int
    model: str
    by: str = Field(description="the detail: turn, difficulty, length, ...")
    value: str | int | float
    score: float
    n: int


class Skipped(Row):
    task: str
    length: int
    reason: str


class Text(Row):
    kind: str
    name: str
    sha256: str


class Losses(Row):
    perplexity: float
    nll: float
    ci95: Interval
    tokens: int
    windows: int
    increase: float | None = Field(None, description="relative to the baseline, paired by window")
    increase_ci95: Interval | None = None


class KindPerplexity(Losses):
    kind: str = Field(description="of text")


class ModelPerplexity(Losses):
    model: str
    kinds: list[KindPerplexity] = Field(description="by kind of text; empty where there is one kind only")


class Perplexity(Row):
    texts: list[Text]
    window: int
    stride: int
    models: list[ModelPerplexity]


class Agreed(Row):
    tokens: int
    top1: float
    top1_ci95: Interval
    kl: float | None = Field(description="mean KL(base || candidate), nats per token")
    kl_ci95: Interval | None
    kl_p99: float | None = Field(description="99 % quantile over tokens, nats")
    kl_p999: float | None = Field(description="99.9 % quantile over tokens, nats")
    kl_tokens: int = Field(description="tokens whose whole distributions were compared")


class KindAgreed(Agreed):
    kind: str = Field(description="of text")


class TextAgreed(Agreed):
    kinds: list[KindAgreed] = Field(description="by kind of text; empty where there is one kind only")


class Divergence(Row):
    prompts: int
    identical: float
    median_first: float
    new_tokens: int


class ModelAgreement(Row):
    model: str
    text: TextAgreed | None = None
    tasks: Agreed | None = None
    divergence: Divergence | None = None


class Agreement(Row):
    baseline: str
    models: list[ModelAgreement]


class Point(Row):
    position: int = Field(description="first token of the bucket")
    end: int | None = Field(None, description="the token after its last")
    tokens: int
    top1: float
    kl: float | None = Field(description="mean KL(base || candidate), nats per token; vLLM and servers give none")
    kl_ci95: Interval | None = None
    kl_tokens: int | None = Field(None, description="tokens whose whole distributions were compared")
    nll_increase: float | None = Field(None, description="nats per token of the baseline's text")


class Curve(Row):
    model: str
    points: list[Point]


class Drift(Row):
    source: str = Field(description="what the positions are counted in")
    models: list[Curve]


class ModelServing(Row):
    model: str
    capacity_tokens_reported: int | None
    decode_tokens_per_s: float | None


class Serving(BaseModel):
    engine: str
    context_tokens: int
    models: list[ModelServing]


class Results(BaseModel):
    """results.json. A part that was not measured is an empty object or list."""

    format_version: Literal[3]
    models: list[Model]
    overall: list[Compared]
    tasks: list[Task]
    multiplicity: Multiplicity
    noise_floor: NoiseFloor | dict[str, None]
    depths: list[Depth]
    breakdown: list[Part]
    skipped: list[Skipped]
    perplexity: Perplexity | dict[str, None]
    agreement: Agreement | dict[str, None]
    drift: Drift | dict[str, None]
    serving: Serving | dict[str, None]
    margin: float
    environment: dict[str, Any]
    seed: int


def json_schema() -> str:
    """The JSON schema as text."""
    return json.dumps(Results.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
