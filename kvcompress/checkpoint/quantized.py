"""Base models whose own weights are stored in 8 bits: the formats we keep, and the numbers that the bytes stand for.

    W = stored * scale      NAME.weight        [out, in], int8 or float8 (e4m3)
                            NAME.weight_scale or NAME.weight_scale_inv: one number, one per output, or one per block

`compress` copies these tensors as they are and puts the base model's `quantization_config` under `base` into the
section it writes, for engines to run them by. Calibration and transformers compute with W, made of one weight at a
time. That is weights alone: formats that quantize activations too (W8A8) do so in the engine, not here, so the keys
and values that a codec is fitted to lack that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.paths import quote
from kvcompress.checkpoint.reader import QUANT_METHOD, Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorInfo
from kvcompress.families import family_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BASE = "base"
"""Key of the base model's quantization_config in ours."""

SCALES = ("weight_scale", "weight_scale_inv")
STORED = ("I8", "F8_E4M3")
_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHT = ".weight"
_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_method")
_FORMATS = {"int-quantized": "int", "float-quantized": "float"}
_STRATEGIES = {"int": ("tensor", "channel"), "float": ("tensor", "channel", "block")}

Block = tuple[int, int]
"""Outputs and inputs that share a scale."""


def base_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The base model's own quantization_config, from its config.json or that of a compressed checkpoint of it.

    Raises:
        ValueError: it is no JSON object.
    """
    section = config.get("quantization_config")
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise ValueError("config.json has a quantization_config that is not an object; was it edited?")
    if section.get("quant_method") == QUANT_METHOD:
        section = section.get(BASE)
    return dict(section) if section else None


def method_of(section: Mapping[str, Any]) -> str:
    """The name of the quantization method, as vLLM spells it."""
    return str(section.get("quant_method")).lower().replace("_", "-")


def check_section(section: Mapping[str, Any]) -> None:
    """Refuse what could not be calibrated on or kept.

    Raises:
        ValueError: another format than those above, or one that quantizes the KV cache too.
    """
    found = _unsupported(section)
    if found is not None:
        raise _refusal(found)
    for key in _CACHE_KEYS:
        if section.get(key):
            raise ValueError(
                f"the base model's quantization_config quantizes the KV cache too ({key}), and a codec takes its "
                f"place; set {key} to null in the base model's config.json, which leaves its weights as they are"
            )


def check_base(checkpoint: Checkpoint) -> bool:
    """Whether a base model's weights are quantized.

    Raises:
        ValueError: in a way that we cannot keep, or config.json and the tensors do not fit together.
    """
    section = base_section(checkpoint.config)
    if section is not None:
        check_section(section)
    scales = scales_of(checkpoint.tensors)
    embedding = f"{family_of(checkpoint.config).names.embedding}{_WEIGHT}"
    for name, info in checkpoint.tensors.items():
        if not name.endswith(_WEIGHT) or info.dtype in _FLOATS:
            continue
        if section is None:
            raise ValueError(
                f"{quote(name)} is stored as {info.dtype} and config.json has no quantization_config that says how "
                "to read it; use a checkpoint whose config.json describes its weights"
            )
        if info.dtype not in STORED or name == embedding:
            raise _refusal(f"{quote(name)} stored as {info.dtype}")
        if name not in scales:
            raise ValueError(f"{quote(name)} is stored as {info.dtype} without a {SCALES[0]}; download it again")
        scale = checkpoint.tensors[scales[name]]
        if scale.dtype not in _FLOATS:
            raise _refusal(f"scales stored as {scale.dtype}")
        _check_scale(name, info.shape, scale.shape, block_of(section))
    if section is not None and not scales:
        raise ValueError(
            f"config.json says that weights are quantized ({method_of(section)}) and no tensor is; remove its "
            "quantization_config or use the quantized checkpoint"
        )
    return section is not None


def scale_of(tensors: Mapping[str, TensorInfo], name: str) -> str | None:
    """The name of a quantized weight's scales; None for any other tensor."""
    if not name.endswith(_WEIGHT) or tensors[name].dtype not in STORED:
        return None
    module = name.removesuffix(_WEIGHT)
    return next((found for scale in SCALES if (found := f"{module}.{scale}") in tensors), None)


def scales_of(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """`scale_of` every quantized weight."""
    return {name: scale for name in tensors if (scale := scale_of(tensors, name)) is not None}


def block_of(section: Mapping[str, Any]) -> Block | None:
    """The blocks that share a scale; None where scales are per tensor or per output."""
    found = next((block for block in _blocks(section) if block), None)
    return None if found is None else (int(found[0]), int(found[1]))


def read_weight(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU: in its stored dtype, or where it is a quantized weight, what it stands for in `dtype`.

    Raises:
        ValueError: no tensor of that name, or scales that do not fit it.
    """
    stored = checkpoint.read(name)
    scale = scale_of(checkpoint.tensors, name)
    if scale is None:
        return stored
    section = base_section(checkpoint.config)
    assert section is not None, "check_base was called"
    return dequantize(name, stored, checkpoint.read(scale), block_of(section)).to(dtype)


def dequantize(name: str, stored_OI: Tensor, scale: Tensor, block: Block | None) -> Tensor:
    """stored * scale in float32.

    Args:
        name: for messages.
        scale: one number, `[out]` or `[out, 1]`, or `[ceil(out / rows), ceil(in / columns)]`.
        block: (rows, columns).

    Raises:
        ValueError: scales of another shape.
    """
    import torch

    _check_scale(name, tuple(stored_OI.shape), tuple(scale.shape), block)
    weight_OI, scale = stored_OI.to(torch.float32), scale.to(torch.float32)
    outputs, inputs = stored_OI.shape
    if scale.numel() == 1:
        return weight_OI.mul_(scale.reshape(()))
    if _per_output(tuple(scale.shape), outputs):
        return weight_OI.mul_(scale.reshape(outputs, 1))
    assert block is not None
    rows, columns = block
    # One row of blocks at a time: no second matrix of this size.
    for index, scale_B in enumerate(scale):
        weight_OI[index * rows : (index + 1) * rows] *= scale_B.repeat_interleave(columns)[:inputs]
    return weight_OI


def _unsupported(section: Mapping[str, Any]) -> str | None:
    """What of a section we cannot keep."""
    method = method_of(section)
    if method not in ("fp8", "compressed-tensors"):
        return f"quant_method {section.get('quant_method')}"
    blocks = _blocks(section)
    for block in blocks:
        if block and not (isinstance(block, list) and [type(size) for size in block] == [int, int] and min(block) > 0):
            return f"{method} with blocks of {block}"
    if any(block != blocks[0] for block in blocks):
        return f"{method} with blocks of several sizes"
    if method == "fp8":
        options: dict[str, Any] = {"fmt": "e4m3", "scale_fmt": "float", "store_dtype": None}
        found = next((key for key, kept in options.items() if section.get(key) not in (None, kept)), None)
        return None if found is None else f"fp8 with {found} {section[found]}"
    sparse = section.get("sparsity_config") or {}
    if section.get("transform_config") or sparse.get("format", "dense") != "dense":
        return f"compressed-tensors with a {'transform' if section.get('transform_config') else 'sparsity'}_config"
    groups = _groups(section)
    if not groups:
        return "compressed-tensors without config_groups"
    return next((found for group in groups if (found := _unsupported_group(section, group))), None)


def _unsupported_group(section: Mapping[str, Any], group: Mapping[str, Any]) -> str | None:
    name = f"compressed-tensors format {group.get('format') or section.get('format')}"
    kind = _FORMATS.get(str(group.get("format") or section.get("format")))
    weights = group.get("weights")
    if kind is None or not weights:
        return name if kind is None else f"{name} with a config group without weights"
    if (weights.get("type", "int"), weights.get("num_bits")) != (kind, 8):
        return f"{name} with {weights.get('num_bits')}-bit {weights.get('type', 'int')} weights"
    if not weights.get("symmetric", True):
        return f"{name} with asymmetric weights"
    strategy = weights.get("strategy") or "tensor"
    return None if strategy in _STRATEGIES[kind] else f"{name} with weights scaled per {strategy}"


def _refusal(found: str) -> ValueError:
    return ValueError(
        f"the base model's weights are quantized as kvcompress does not support: found {found}; supported are fp8 (per "
        "tensor or in blocks) and compressed-tensors with symmetric 8-bit weights (int-quantized or float-quantized); "
        "compress a checkpoint of such a kind, or the unquantized one"
    )


def _groups(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = section.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _blocks(section: Mapping[str, Any]) -> list[Any]:
    """The block sizes a section gives, for each of its groups; None where there is none."""
    if method_of(section) == "fp8":
        return [section.get("weight_block_size")]
    return [(group.get("weights") or {}).get("block_structure") for group in _groups(section)]


def _per_output(scale: tuple[int, ...], outputs: int) -> bool:
    return scale in ((outputs,), (outputs, 1))


def _check_scale(name: str, weight: tuple[int, ...], scale: tuple[int, ...], block: Block | None) -> None:
    expected = "one number or one per output"
    if len(weight) == 2:
        outputs, inputs = weight
        if scale in ((), (1,), (1, 1)) or _per_output(scale, outputs):
            return
        if block is not None:
            blocks = (-(-outputs // block[0]), -(-inputs // block[1]))
            if scale == blocks:
                return
            expected += f" or {list(blocks)}"
    raise ValueError(
        f"{quote(name)} of shape {list(weight)} has scales of shape {list(scale)}; expected {expected}; config.json "
        "and the weights do not belong together"
    )
