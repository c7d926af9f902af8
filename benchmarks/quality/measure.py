"""How far a cache moves a model's next-token distributions from those with its ordinary cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .views import Views, views_of
from .windows import Window

QUARTERS = 4


@dataclass(frozen=True)
class Candidate:
    """A model and the caches it runs with."""

    model: Any
    new_cache: Callable[[], Any]
    """An empty cache for one sequence."""
    views: Views | None = None


@dataclass(frozen=True)
class Scores:
    """Of one window, a value per token: what the model says after it."""

    kl_T: Tensor
    """KL(base || candidate) in nats."""
    same_T: Tensor
    """Whether the most probable token is the base's."""
    nll_T: Tensor
    """Of the token that follows, in nats; one value less."""
    base_nll_T: Tensor


def score(
    base: Any,
    candidates: Sequence[Candidate],
    windows: Sequence[Window],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Scores]]:
    """Scores of every candidate on every window; one at a time, so that memory holds two windows' distributions.

    Args:
        base: the uncompressed transformers model in float32.
        progress: told how many passes are done, and of how many.
    """
    found: list[list[Scores]] = [[] for _ in candidates]
    total, done = len(windows) * (len(candidates) + 1), 0
    for window in windows:
        reference_TV = log_probabilities(Candidate(base, lambda: None), window)
        progress(done := done + 1, total)
        for scores, candidate in zip(found, candidates, strict=True):
            scores.append(compare(reference_TV, log_probabilities(candidate, window), window))
            progress(done := done + 1, total)
    return found


@torch.inference_mode()
def log_probabilities(candidate: Candidate, window: Window) -> Tensor:
    """Log probabilities `[tokens, vocabulary]` of what follows every token of a window.

    The window is read in one pass, or in the steps that the cache asks for so that its loss shows.
    """
    from kvcompress.serving.transformers import prepare

    model, cache = candidate.model, candidate.new_cache()
    tokens_1T = torch.tensor([window.tokens], device=model.device)
    sizes = [len(window.tokens)]
    if hasattr(cache, "scoring_steps"):
        prepare(model, cache)
        sizes = cache.scoring_steps(len(window.tokens), len(window.tokens))
    with views_of(model, candidate.views):
        parts = [
            model(step, past_key_values=cache, use_cache=cache is not None).logits[0].float().log_softmax(-1)
            for step in tokens_1T.split(sizes, dim=1)
        ]
    return torch.cat(parts)


def compare(base_TV: Tensor, ours_TV: Tensor, window: Window) -> Scores:
    """Scores from log probabilities of one window."""
    follow_T = torch.tensor(window.tokens[1:], device=base_TV.device)[:, None]
    kl, same = [], []
    for base, ours in zip(
        base_TV.split(256), ours_TV.split(256), strict=True
    ):  # few rows at a time: no third whole copy
        kl.append((base.exp() * (base - ours)).sum(-1).clamp_min(0))
        same.append(base.argmax(-1) == ours.argmax(-1))
    nll = [-log_TV[:-1].gather(1, follow_T)[:, 0].cpu() for log_TV in (ours_TV, base_TV)]
    return Scores(torch.cat(kl).cpu(), torch.cat(same).cpu(), *nll)


def mean_kl(scores: Sequence[Scores]) -> float:
    """Over all tokens of the windows, in nats."""
    return float(torch.cat([one.kl_T for one in scores]).double().mean())


def summary(scores: Sequence[Scores]) -> dict[str, Any]:
    """Figures over windows of one length: KL's mean and quantiles, same top token in percent, perplexities, and the
    mean KL of each quarter of the windows.
    """
    kl_T = torch.cat([one.kl_T for one in scores]).double()
    nll, base = (torch.cat([getattr(one, name) for one in scores]).double() for name in ("nll_T", "base_nll_T"))
    quarters = [[part.double() for part in one.kl_T.tensor_split(QUARTERS)] for one in scores]
    return {
        "tokens": len(kl_T),
        "kl": float(kl_T.mean()),
        "kl_99": float(kl_T.quantile(0.99)),
        "kl_999": float(kl_T.quantile(0.999)),
        "same_top": 100 * float(torch.cat([one.same_T for one in scores]).double().mean()),
        "perplexity": float(nll.mean().exp()),
        "base_perplexity": float(base.mean().exp()),
        "kl_quarters": [float(torch.cat(parts).mean()) for parts in zip(*quarters, strict=True)],
    }
