"""What a recipe will do to a model, from config.json and safetensors headers alone. Imports no torch."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from kvcompress.checkpoint.completeness import check_complete
from kvcompress.checkpoint.quantized import check_base, scales_of
from kvcompress.checkpoint.reader import Checkpoint, refuse_compressed
from kvcompress.codec.spec import CodecSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import TrainedConfig
from kvcompress.model_config import CHANGING_ROPE, parse, unknown
from kvcompress.pipeline import stages
from kvcompress.pipeline.resolve import CacheStages, resolve
from kvcompress.recipe import Recipe

DEFAULT_CONTEXT = 32768
_GIB = 1 << 30
_RUNTIME_BYTES = 500 << 20
"""Resident size of Python with torch and transformers imported and a tokenizer loaded, before any work."""
_KEPT, _RECOMPUTED, _LOGITS = 40, 2, 6
"""Values a training step keeps per token: times hidden size and layers (all, or inputs only), and times vocabulary."""
_COMPUTE_BYTES = 4
"""Calibration runs in float32 unless asked otherwise."""


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a model's sizes. `spec` has the exact bytes; bands that depend on data are nominal."""

    model: str
    recipe: Recipe
    geometry: ModelGeometry
    cache: CacheStages
    spec: CodecSpec
    weights_bytes: int
    compressed_weights_bytes: int
    base_bytes_per_token: int
    peak_rss_bytes: int
    context: int
    memory_bytes: int

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.spec, self.geometry)

    @property
    def bytes_per_request(self) -> int:
        """Bytes a request takes besides its tokens: factors and exact tokens of caches that have some."""
        return sum(getattr(layer, "bytes_per_request", 0) for layer in self.spec.layers)

    @property
    def ratio(self) -> float:
        return self.base_bytes_per_token / self.bytes_per_token

    def to_json(self) -> dict[str, Any]:
        """The stable shape that `plan --json` prints."""
        return {
            "model": self.model,
            "recipe": self.recipe.to_json(),
            "bytes_per_token": {
                "base": self.base_bytes_per_token,
                "compressed": self.bytes_per_token,
                "ratio": round(self.ratio, 4),
            },
            "weights_bytes": {"base": self.weights_bytes, "compressed": self.compressed_weights_bytes},
            "peak_rss_bytes": self.peak_rss_bytes,
            "capacity_tokens": {
                "memory_bytes": self.memory_bytes,
                "base": self.memory_bytes // self.base_bytes_per_token,
                "compressed": self.memory_bytes // self.bytes_per_token,
            },
            "context": {
                "tokens": self.context,
                "base_bytes": self.context * self.base_bytes_per_token,
                "compressed_bytes": self.context * self.bytes_per_token + self.bytes_per_request,
            },
            "layers": [layer_summary(index, self.spec, self.geometry) for index in range(self.geometry.num_layers)],
        }


def make(
    checkpoint: Checkpoint,
    recipe: Recipe,
    model: str,
    *,
    context: int = DEFAULT_CONTEXT,
    memory_bytes: int = _GIB,
    calibration_tokens: int = 0,
    strict: bool = False,
) -> Plan:
    """Check a recipe against a model and say what it will cost and save.

    Args:
        context: tokens of one request, for the bytes it will take.
        memory_bytes: cache memory to fill with tokens.
        calibration_tokens: samples x length that `compress` will run.
        strict: refuse a model family that we do not know, which is otherwise tried with a warning.

    Raises:
        ValueError: unsupported, already compressed or otherwise quantized model, or a recipe that does not fit it.
    """
    refuse_compressed(checkpoint)
    config = parse(checkpoint.config)
    if config.family.tried:
        if strict:
            raise unknown(config.architecture, checkpoint.config["model_type"])
        warnings.warn(
            f"{config.architecture} is not known to kvcompress: it is taken to be an ordinary decoder, whose parts "
            "have the usual names; let --strict refuse it, and measure what the result can do",
            stacklevel=2,
        )
    base = ModelGeometry.of(config)
    if check_base(checkpoint):
        stages.refuse_quantized(recipe)
    check_complete(checkpoint, config)
    before = stages.outline_of(checkpoint)
    after = stages.outlines(recipe, before)
    geometry = base if after is before else after.geometry
    if context < 1 or memory_bytes < 1:
        raise ValueError("context and memory must be positive")
    cache = resolve(recipe, geometry)
    if cache.layers:
        _refuse_changing_rope(recipe, config.rope.kind)
    return Plan(
        model=model,
        recipe=recipe,
        geometry=geometry,
        cache=cache,
        spec=cache.spec,
        weights_bytes=checkpoint.weights_bytes,
        compressed_weights_bytes=after.weights_bytes,
        base_bytes_per_token=base.kv_bytes_per_token(),
        peak_rss_bytes=max(_peak_rss(checkpoint, cache, calibration_tokens), _training_rss(checkpoint, recipe, base)),
        context=context,
        memory_bytes=memory_bytes,
    )


def bytes_per_token(spec: CodecSpec, geometry: ModelGeometry) -> int:
    """Bytes one token takes in all layers; layers without a codec count at the model's own dtype."""
    return sum(
        geometry.layer_kv_bytes_per_token(index) if layer is None else layer.bytes_per_token
        for index, layer in enumerate(spec.layers)
    )


def layer_summary(index: int, spec: CodecSpec, geometry: ModelGeometry) -> dict[str, Any]:
    """One layer as `plan`, `inspect` and the manifest show it."""
    layer = spec.layers[index]
    if layer is None:
        window = geometry.sliding_window[index]
        plain = geometry.layer_kv_bytes_per_token(index)
        reason = f"sliding window of {window}" if window else "no cache method in the recipe"
        if geometry.latent_dims is not None:
            reason = f"latent attention: {geometry.latent_dims[index]} channels for all heads, as they are"
        return {"index": index, "k": None, "v": None, "bytes_per_token": plain, "reason": reason}
    return {"index": index, **layer.summary(), "bytes_per_token": layer.bytes_per_token}


def _refuse_changing_rope(recipe: Recipe, kind: str) -> None:
    if kind in CHANGING_ROPE:
        stage = recipe.stage("basis") or recipe.stage("encoding")
        assert stage is not None
        raise recipe.locate(
            stage,
            ValueError(
                f"the model's RoPE is of type {kind}, whose frequencies change with the text's length, and differently "
                f"in transformers and vLLM; a codec of {stage.method} is fitted to keys of one length and would be "
                "wrong at others; only stages that change weights can be used on this model"
            ),
        )


def _peak_rss(checkpoint: Checkpoint, cache: CacheStages, calibration_tokens: int) -> int:
    """Runtime, the largest layer as it is loaded, the hidden states (in and out) and what the basis is fitted to."""
    layers: dict[str, int] = {}
    quantized = scales_of(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        if "layers" in parts:
            key = parts[parts.index("layers") + 1]
            dense = _COMPUTE_BYTES * math.prod(info.shape) if name in quantized else 0
            layers[key] = layers.get(key, 0) + info.nbytes + dense
    hidden = 2 * calibration_tokens * cache.geometry.hidden_size * _COMPUTE_BYTES
    fit, _ = cache.fit_bytes(calibration_tokens)
    return _RUNTIME_BYTES + max(layers.values(), default=0) + hidden + fit


def _training_rss(checkpoint: Checkpoint, recipe: Recipe, geometry: ModelGeometry) -> int:
    """Runtime, whole models in float32, and activations: logits a few times over, and what a layer keeps."""
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    peak = 0
    for stage in recipe.stages:
        if isinstance(stage, TrainedConfig):
            kept = _RECOMPUTED if stage.recompute else _KEPT
            layers = kept * geometry.num_layers * geometry.hidden_size
            token = layers + _LOGITS * geometry.vocab_size
            peak = max(peak, _RUNTIME_BYTES + 4 * (stage.whole_models * parameters + stage.tokens_at_a_time * token))
    return peak
