"""What the CUDA kernels are tested with, by emulation and on a GPU."""

from __future__ import annotations

from benchmarks.cases.heads import bands
from kvcompress.codec.bands import SideSpec

MIXED_K = bands((8, 24), (4, 16), (2, 8))
MIXED_V = bands((8, 8), (4, 8), (2, 40))
# Every instance of csrc/cuda/heads/instances.h, with both numbers of tiles where it has two, and unusual bands.
SIDES = [
    (64, bands((16, 64)), bands((16, 64))),
    (128, bands((16, 128)), bands((16, 128))),
    (64, bands((8, 64)), bands((8, 64))),
    (128, bands((8, 128)), bands((8, 128))),
    (64, bands((8, 64), outliers=1), bands((8, 64))),
    (64, bands((8, 64)), bands((4, 64))),
    (128, bands((8, 128)), bands((4, 128))),
    (128, bands((8, 128), outliers=1), bands((4, 128), outliers=2)),
    (64, bands((4, 64)), bands((4, 64))),
    (128, bands((4, 128)), bands((4, 128))),
    (128, bands((4, 128), outliers=2), bands((4, 128), outliers=1)),
    (64, bands((4, 64)), bands((2, 64))),
    (128, bands((4, 128)), bands((2, 128))),
    (128, bands((4, 128)), bands((2, 128), outliers=2)),
    (64, bands((2, 64)), bands((2, 64))),
    (128, bands((2, 128)), bands((2, 128))),
    (64, bands((2, 64), outliers=2), bands((2, 64), outliers=2)),
    (64, MIXED_K, MIXED_V),
    (64, bands(*MIXED_K.bands, outliers=2), bands(*MIXED_V.bands, outliers=1)),
    (128, bands((8, 24), (4, 40), (2, 56)), bands((4, 72), (2, 56))),
    (128, bands((16, 96)), bands((4, 72))),
    (64, bands((4, 8)), bands((16, 40))),
    (128, bands((2, 128)), bands((8, 56), outliers=1)),
    # Heads of 256 channels (Gemma, Qwen3-Next).
    (256, bands((16, 256)), bands((16, 256))),
    (256, bands((8, 256)), bands((8, 256))),
    (256, bands((8, 256)), bands((4, 256))),
    (256, bands((4, 256)), bands((4, 256))),
    (256, bands((4, 256)), bands((2, 256))),
    (256, bands((2, 256)), bands((2, 256))),
    (256, bands((4, 256), outliers=1), bands((4, 256), outliers=2)),
    (256, bands((8, 40), (4, 136), (2, 80)), bands((4, 192))),
    (256, bands((4, 256)), bands((8, 64))),
    (192, bands((4, 192)), bands((4, 192))),
]


def bar(*sides: SideSpec) -> float:
    """Relative error of the output: half-precision queries and weights, and the offsets' cancellation."""
    return 5e-3 if any(band.bits == 2 for side in sides for band in side.bands) else 3e-3
