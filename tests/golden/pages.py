"""Golden pages: keys and values made of whole numbers, and the bytes they are stored as, in both orders.

Every implementation (torch, CPU, CUDA and its emulation) must store the same bytes. `python -m tests.golden.pages`
writes pages.json anew from the torch code; its diff is a change of the format on disk and in memory.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch

from benchmarks.cases.golden import HEADS, SIDES, Golden, codec_of, make, tokens

FILE = Path(__file__).with_suffix(".json")


def read(name: str) -> Golden:
    """What is committed."""
    stored = json.loads(FILE.read_text())[name]
    codec = codec_of(*SIDES[name])
    orders = [
        torch.frombuffer(bytearray(base64.b64decode(stored[order])), dtype=torch.uint8).view(HEADS, -1)
        for order in ("token_major", "fragment")
    ]
    return Golden(codec, tokens(0), tokens(1), *orders)


def main() -> None:
    stored = {}
    for name in SIDES:
        made = make(name)
        orders = {"token_major": made.token_major_HX, "fragment": made.fragment_HX}
        stored[name] = {
            order: base64.b64encode(record_HX.numpy().tobytes()).decode() for order, record_HX in orders.items()
        }
    FILE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
