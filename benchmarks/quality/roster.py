"""The peers by name, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .hadamard import hadamard, rotated
from .integers import BLOCK, fp8_e4m3, group_size, min_max, q4_0, q8_0
from .kivi import kivi
from .oscar import fit, oscar
from .peer import Peer, Side
from .turboquant import turboquant
from .windows import Window

Quantizer = Callable[[Tensor], Tensor]
Calibration = Callable[[], list[Window]]
"""Windows to calibrate on, made when a peer asks for them."""


def fp8(model: Any, calibration: Calibration) -> Peer:
    """vLLM's `fp8_e4m3` with scale 1, its default where a checkpoint brings no scales; rounding as torch's.

    Not simulated: kernels that also round queries or softmax weights to 8 bits.
    """
    return _both(fp8_e4m3, lambda head_dim: 8)


def int4(model: Any, calibration: Calibration) -> Peer:
    """Asymmetric 4 bits, min-max per token and head, scale and zero point 16 bits each; no rotation.

    What vLLM's `int4_per_token_head` would be without its Hadamard matrix, and SAW-INT4's (arXiv 2604.19157) baseline.
    """
    return _both(_int4, lambda head_dim: 4 + 32 / head_dim)


def int4_hadamard(model: Any, calibration: Calibration) -> Peer:
    """vLLM's `int4_per_token_head`: Hadamard, then asymmetric 4 bits, min-max per token and head.

    Counted as vLLM stores it: 16 bits per token and head, the zero point in the low bits of the scale's mantissa.
    Simulated with scale and zero point in 16 bits each, which flatters it slightly; without its random signs.
    """
    return _both(_turned(_int4), lambda head_dim: 4 + 16 / head_dim)


def q4_hadamard(model: Any, calibration: Calibration) -> Peer:
    """llama.cpp's `-ctk q4_0 -ctv q4_0`, which rotates queries, keys and values by a Hadamard matrix (its #21038)."""
    return _both(_turned(q4_0), lambda head_dim: 4 + 16 / group_size(head_dim, BLOCK))


def q8_hadamard(model: Any, calibration: Calibration) -> Peer:
    """llama.cpp's `-ctk q8_0 -ctv q8_0`, rotated likewise."""
    return _both(_turned(q8_0), lambda head_dim: 8 + 16 / group_size(head_dim, BLOCK))


def turbo(bits: int, model: Any, calibration: Calibration) -> Peer:
    """TurboQuant in 4, 3 or 2 bits with a 16-bit norm, keys and values alike, in every layer.

    Not simulated: vLLM's uniform codes for values, and the first and last two layers that it leaves in 16 bits.
    """
    return _both(partial(turboquant, bits=bits), lambda head_dim: bits + 16 / head_dim)


def kivi_2(model: Any, calibration: Calibration) -> Peer:
    """KIVI in 2 bits; see `quality.kivi`."""
    return kivi(2)


def oscar_2(model: Any, calibration: Calibration) -> Peer:
    """OSCAR's INT2 with rotations fitted to other text; see `quality.oscar`."""
    return oscar(fit(model, [window.tokens for window in calibration()]))


PEERS: dict[str, Callable[[Any, Calibration], Peer]] = {
    "q8_0-hadamard": q8_hadamard,
    "fp8": fp8,
    "q4_0-hadamard": q4_hadamard,
    "int4": int4,
    "int4-hadamard": int4_hadamard,
    "turboquant-4": partial(turbo, 4),
    "turboquant-3": partial(turbo, 3),
    "turboquant-2": partial(turbo, 2),
    "kivi-2": kivi_2,
    "oscar-int2": oscar_2,
}
"""By the name of the command line: makes a peer for a loaded model."""

LABELS = {
    "q8_0-hadamard": "q8_0 + Hadamard (llama.cpp)",
    "fp8": "fp8 e4m3 (vLLM)",
    "q4_0-hadamard": "q4_0 + Hadamard (llama.cpp)",
    "int4": "int4 per token and head",
    "int4-hadamard": "int4 per token and head + Hadamard (vLLM)",
    "turboquant-4": "TurboQuant 4",
    "turboquant-3": "TurboQuant 3",
    "turboquant-2": "TurboQuant 2",
    "kivi-2": "KIVI-2, newest 128 exact",
    "oscar-int2": "OSCAR INT2, 64 + 256 exact",
}
"""How tables name them."""


def _int4(states: Tensor) -> Tensor:
    return min_max(states, 4, states.shape[-1])


def _turned(quantize: Quantizer) -> Quantizer:
    """Quantized in the coordinates of a Hadamard matrix."""

    def apply(states: Tensor) -> Tensor:
        rotation = hadamard(states.shape[-1])
        return rotated(quantize(rotated(states, rotation)), rotation.mT)

    return apply


def _both(quantize: Quantizer, bits: Callable[[int], float]) -> Peer:
    """Keys and values alike, every token by itself."""

    def stored(states: Tensor, side: Side, layer: int) -> Tensor:
        return quantize(states)

    return Peer(stored, lambda head_dim, length: bits(head_dim))
