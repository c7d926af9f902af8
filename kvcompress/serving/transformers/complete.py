"""Whether transformers has what it says it has loaded: it warns of weights that it made up, and goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress.checkpoint.quantized import base_section
from kvcompress.checkpoint.reader import is_compressed
from kvcompress.checkpoint.safetensors_file import read_header, torch_dtype
from kvcompress.families import family_of
from kvcompress.modeling.low_rank import LowRankLinear, ranks_of

_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Dtypes of tensors that are the weights themselves, whatever dtype the model has."""


def require_all(model: Any, files: Iterable[str]) -> None:
    """Refuse checkpoint files that lack a parameter of a model, still without data, that is about to be loaded.

    Raises:
        ValueError: naming the first one.
    """
    stored = {name: info for file in files for name, info in read_header(Path(file)).tensors.items()}
    prefix, family = f"{model.base_model_prefix}.", family_of({"architectures": model.config.architectures})
    # Another class than that of config.json, such as a classifier, has a head that the checkpoint need not have.
    inner = model if type(model).__name__ in (model.config.architectures or ()) else model.base_model
    needed = {id(parameter) for parameter in inner.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in needed or name in model.all_tied_weights_keys:
            continue
        part = family.stored(name)[0].replace("*", "0")
        info = next((stored[own] for own in (part, prefix + part, part.removeprefix(prefix)) if own in stored), None)
        if info is None:
            raise ValueError(
                f"{model.config.name_or_path or 'the checkpoint'} lacks {name}, which transformers would fill with "
                "random numbers; get the checkpoint again, or compress the complete model"
            )
        if info.dtype not in _NUMBERS and torch_dtype(Path(info.file), info) != parameter.dtype:
            raise ValueError(
                f"{model.config.name_or_path or 'the checkpoint'} lacks a scale for {name}, stored as {info.dtype}, "
                "which transformers would take as it is; get the checkpoint again"
            )


def refuse_unread(config: Mapping[str, Any]) -> None:
    """Refuse to go on beside a model that was loaded before this package was imported, where that makes a difference.

    transformers has then taken factored layers for missing ones, or quantized weights for weights. A cache gets to see
    no model, so all that are in memory are looked at.

    Args:
        config: of the checkpoint that a cache is made for.

    Raises:
        ValueError: there is such a model.
    """
    if not ranks_of(config) and base_section(config) is None:
        return
    for found in gc.get_objects():
        if issubclass(type(found), PreTrainedModel) and _is_unread(found):
            raise ValueError(
                f"{found.config.name_or_path} was loaded without kvcompress and has random or unscaled weights; import "
                "kvcompress.serving.transformers before from_pretrained, and load the model again"
            )


def _is_unread(model: Any) -> bool:
    section = getattr(model.config, "quantization_config", None)
    config = {"quantization_config": section if isinstance(section, dict) else getattr(section, "to_dict", dict)()}
    if not is_compressed(config) or next(model.parameters()).device.type == "meta":
        return False
    if ranks_of(config):
        return not any(isinstance(module, LowRankLinear) for module in model.modules())
    return base_section(config) is not None
