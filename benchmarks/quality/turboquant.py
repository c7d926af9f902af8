"""TurboQuant's scalar form: rotate, normalise every vector, code its channels by a Gaussian codebook.

Source: arXiv 2504.19874, and vLLM's `turboquant_4bit_nc` and `turboquant_3bit_nc`, which correct the stored norm by the
norm of the coded vector ("nc") and leave the paper's one-bit residual sketch out.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .hadamard import hadamard, rotated


@cache
def gaussian_codebook(bits: int) -> Tensor:
    """The `2**bits` values of least squared error for a standard normal variable (Lloyd 1957, Max 1960), ascending.

    Lloyd's iteration with the cells' exact means: (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)).
    """
    values = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([-ends, (values[1:] + values[:-1]) / 2, ends])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        values = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
    return values.float()


def turboquant(states: Tensor, bits: int) -> Tensor:
    """States `[..., D]` in `bits` per channel and a 16-bit norm per vector."""
    rotation = hadamard(states.shape[-1])
    turned = rotated(states, rotation)
    norm = turned.norm(dim=-1, keepdim=True).half().float()
    book = gaussian_codebook(bits).to(states)
    unit = turned / norm.clamp_min(1e-8) * math.sqrt(states.shape[-1])
    coded = book[torch.bucketize(unit, (book[1:] + book[:-1]) / 2)]
    return rotated(coded / coded.norm(dim=-1, keepdim=True) * norm, rotation.mT)
