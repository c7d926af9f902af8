"""Every parameter of a served model comes from the checkpoint, or the engine does not start.

vLLM makes sure of that by itself only where no quantization method is named; where one is, a tensor that the checkpoint
lacks leaves its parameter as memory happened to be. Names are looked at as they are read and as the model takes them:
a merged layer, such as q, k and v in one, counts as loaded for vLLM as soon as one of its parts is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

_WHOLE = ("weight", "bias")
"""Endings of tensors that every part of a merged layer has if one of them does."""


def require_all(model: Any, factored: Collection[str], source: str) -> None:
    """Have a model that was just built refuse the checkpoint it is loaded from if that lacks a parameter.

    Only the first load is the whole checkpoint; what comes later (updates of a running engine) may be parts of it.

    Args:
        model: one of vLLM's, with `load_weights`.
        factored: names of the linear layers that are served from factors; those look after themselves.
        source: the checkpoint, for the message.
    """
    load = model.load_weights

    def checked(weights: Iterable[tuple[str, Tensor]], *arguments: Any, **options: Any) -> Any:
        seen: set[str] = set()
        loaded = load(_noting(weights, seen), *arguments, **options)
        del model.load_weights
        lacking = missing_parts(seen, getattr(model, "packed_modules_mapping", {}), factored)
        if loaded is not None:
            lacking = [*lacking, *missing_parameters(model, loaded)]
        if lacking:
            raise ValueError(
                f"{source} lacks {', '.join(lacking[:4])}{' and others' if len(lacking) > 4 else ''}, which the model "
                "needs and vLLM would serve from uninitialised memory; get the checkpoint again, or compress the "
                "complete model"
            )
        return loaded

    model.load_weights = checked


def missing_parameters(model: nn.Module, loaded: Collection[str]) -> list[str]:
    """Parameters that a checkpoint has to bring and that were not loaded, by vLLM's names."""
    return [
        name
        for path, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if (name := f"{path}.{own}" if path else own) not in loaded
        and parameter.numel()
        and not _filled_otherwise(model, module, name, parameter, loaded)
    ]


def missing_parts(seen: Collection[str], merged: Mapping[str, Sequence[str]], factored: Collection[str]) -> list[str]:
    """Tensors of merged layers that are not among those read while another part's are, by the checkpoint's names."""
    parts_of = {part: parts for parts in merged.values() if len(parts) > 1 for part in parts}
    lacking = set()
    for name in seen:
        layer, _, ending = name.rpartition(".")
        parent, _, part = layer.rpartition(".")
        if ending in _WHOLE and part in parts_of:
            others = {f"{parent}.{other}" for other in parts_of[part]} - set(factored)
            lacking |= {f"{other}.{ending}" for other in others} - set(seen)
    return sorted(lacking)


def _noting(weights: Iterable[tuple[str, Tensor]], seen: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        seen.add(name)
        yield name, tensor


def _filled_otherwise(
    model: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter, loaded: Collection[str]
) -> bool:
    """Whether no checkpoint brings a parameter: scales of an ordinary cache, and what quantizing on the way makes.

    A parameter that has two names, as tied embeddings have, is loaded under one of them.
    """
    method = getattr(module, "quant_method", None)
    if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
        return True
    if name.endswith(".input_scale_ub"):
        return True
    return any(
        other is parameter and alias in loaded for alias, other in model.named_parameters(remove_duplicate=False)
    )
