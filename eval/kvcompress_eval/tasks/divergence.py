"""KL divergence of two models' next-token distributions."""

from __future__ import annotations

from typing import Any

import numpy as np


def kl_rows(base_TV: np.ndarray[Any, Any], other_TV: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """KL(base || other) of each token in nats, [T], from log probabilities [T, V]."""
    base, other = base_TV.astype(np.float64), other_TV.astype(np.float64)
    # A probability of zero contributes nothing, and its logarithm must not turn that into nan.
    gap = np.subtract(base, other, out=np.zeros_like(base), where=np.isfinite(base))
    result: np.ndarray[Any, Any] = (np.exp(base) * gap).sum(-1)
    return result
