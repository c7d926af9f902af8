"""Every code by its bits: the one list. Recipes, specs, allocation, pages and kernels' cover follow from it. No torch.

A code of a kind that is there is one entry here; of another kind, a file beside this one and its entry. Kernels that
learn to unpack it (`csrc/cpu`, `csrc/cuda`) are named in the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcompress.codec.codes.code import Code
from kvcompress.codec.codes.float import Float
from kvcompress.codec.codes.uniform import Uniform

CODES: dict[int, Code] = {
    32: Float(32, 1.0, 0.0, ("cpu",)),
    16: Float(16, 1.0, 0.0, ("cpu", "cuda")),
    8: Uniform(8, 0.0308, 8.73e-5, ("cpu", "cuda")),
    4: Uniform(4, 0.3352, 0.0115, ("cpu", "cuda")),
    2: Uniform(2, 0.9957, 0.1188, ("cpu", "cuda")),
}


def widths(wanted: Callable[[Code], bool] = lambda code: True) -> tuple[int, ...]:
    """Bits of all codes, or of those that are wanted, most first."""
    return tuple(sorted((bits for bits, code in CODES.items() if wanted(code)), reverse=True))


def quantized() -> tuple[int, ...]:
    """Bits of the codes that share a gain: those that a budget is spent on and that blocks are made of."""
    return widths(lambda code: code.has_gain)


def listed(bits: Sequence[int]) -> str:
    """As a sentence has it: "8, 4 or 2"."""
    return " or ".join(filter(None, (", ".join(map(str, bits[:-1])), str(bits[-1]))))
