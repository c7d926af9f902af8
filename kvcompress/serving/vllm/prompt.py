"""Form `prompt` in vLLM: refused."""

from __future__ import annotations

from typing import NoReturn

from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.vllm import compat


def check(engine: compat.Engine, codec: CodecSpec) -> NoReturn:
    """Raises ValueError: always; so nothing is attached."""
    raise ValueError(
        "the codec finds its basis in each prompt (xkv with basis: prompt), so no two requests could share pages and a "
        "prompt would need its whole cache first; serve it through transformers, or compress the model with basis: "
        "calibrated"
    )
