"""Engines that run a model: transformers, vLLM offline, or any OpenAI-compatible URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress_eval.engines.base import Engine, Generation, Scores
from kvcompress_eval.engines.names import ENGINES, TRANSFORMERS, VLLM
from kvcompress_eval.tokenizer import TextTokenizer

__all__ = ["Engine", "Generation", "Scores", "check_engine", "open_engine"]


def check_engine(kind: str) -> None:
    """Refuse an unknown engine before any work is done.

    Raises:
        ValueError: neither a known engine nor a URL.
    """
    if kind not in ENGINES and not is_url(kind):
        raise ValueError(f"unknown engine {kind!r}; expected {', '.join(ENGINES)} or an http(s):// URL")


def is_url(kind: str) -> bool:
    return kind.startswith(("http://", "https://"))


def open_engine(
    kind: str, model: Path, tokenizer: TextTokenizer, *, max_context: int, dtype: str = "auto", **options: Any
) -> Engine:
    """Start an engine on a model folder.

    Args:
        kind: transformers, vllm, or the URL of a server that serves this model. (What `auto` means is chosen before.)
        max_context: longest prompt plus continuation in tokens.
        options: handed to the engine's class.
    """
    check_engine(kind)
    if kind == TRANSFORMERS:
        from kvcompress_eval.engines.transformers_engine import TransformersEngine

        return TransformersEngine(model, tokenizer, dtype=dtype, **options)
    if kind == VLLM:
        from kvcompress_eval.engines.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer, max_context=max_context, dtype=dtype, **options)
    from kvcompress_eval.engines.openai_engine import OpenAIEngine

    return OpenAIEngine(kind, tokenizer, **options)
