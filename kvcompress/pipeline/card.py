"""The model card of a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.quantized import method_of
from kvcompress.recipe import Recipe


def model_card(manifest: Manifest, recipe: Recipe, base: Mapping[str, Any] | None = None) -> str:
    """Markdown: what was done, what it saves, how to serve it. Quality is added by whoever measures it.

    Args:
        base: the base model's own quantization_config, if it has one.
    """
    size, weights = manifest.bytes_per_token, manifest.weights_bytes
    calibration = manifest.calibration
    errors = [layer["relative_error"] for layer in manifest.layers if "relative_error" in layer]
    latent = recipe.stage("attention") is not None
    plain = [] if latent else [layer["index"] for layer in manifest.layers if layer["k"] is None]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [kvcompress, kv-cache, long-context]",
        "---",
        f"# {manifest.parent.source}, {_title(manifest)}",
        "",
        f"Made with kvcompress {manifest.kvcompress_version} from `{manifest.parent.source}`. {_what(manifest)}",
        "",
        "| | base | compressed |",
        "| --- | --- | --- |",
        f"| KV cache, bytes per token | {size.base:,} | {size.compressed:,} |",
        f"| weights, bytes | {weights.base:,} | {weights.compressed:,} |",
        "",
        *_errors(errors),
        f"Calibrated on {calibration.tokens if calibration else 0:,} tokens "
        f"of `{calibration.name if calibration else 'nothing'}`.",
        *([f"Layers left uncompressed (sliding window): {', '.join(map(str, plain))}."] if plain and errors else []),
        "",
        "## Use",
        "",
        "```",
        "vllm serve THIS_FOLDER        # with kvcompress installed beside vLLM",
        "kvcompress verify THIS_FOLDER",
        "```",
        "",
        *(_without_plug_in(manifest) if base is None else _quantized(base)),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _kinds(manifest: Manifest) -> set[str]:
    return {stage["kind"] for stage in manifest.stages}


def _title(manifest: Manifest) -> str:
    parts = []
    if _kinds(manifest) & {"attention", "basis", "encoding"}:
        parts.append(f"KV cache compressed {manifest.bytes_per_token.ratio:.2f}x")
    if "weights" in _kinds(manifest):
        sizes = manifest.weights_bytes
        parts.append(f"weights {100 * (1 - sizes.compressed / sizes.base):.1f} % smaller")
    return ", ".join(parts)


def _what(manifest: Manifest) -> str:
    kinds = _kinds(manifest)
    weights = {
        "weights": "linear layers are stored as low-rank factors",
        "attention": "attention keeps one latent vector per token for all heads, in converted weights",
    }
    changed = [text for kind, text in weights.items() if kind in kinds] or ["the weights are unchanged"]
    if kinds & {"basis", "encoding"}:
        changed.append("the key-value cache is stored in fewer bytes")
    text = "; ".join(changed)
    return f"{text[0].upper()}{text[1:]}."


def _errors(errors: list[float]) -> list[str]:
    if not errors:
        return []
    return [
        f"Error of the attention output on calibration text, mean over layers: {sum(errors) / len(errors):.4f}",
        f"(largest {max(errors):.4f}).",
    ]


_LOAD = [
    "In transformers, import kvcompress before the model is loaded:",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM",
    "from kvcompress.serving.transformers import CompressedCache",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
    'model.generate(**inputs, past_key_values=CompressedCache.from_pretrained("THIS_FOLDER"))',
    "```",
    "",
]


def _without_plug_in(manifest: Manifest) -> list[str]:
    if "attention" in _kinds(manifest):
        return [*_LOAD, "Without that import transformers does not know the architecture and stops."]
    if "weights" in _kinds(manifest):
        return [
            *_LOAD,
            "**Without that import the model is loaded with random numbers in place of its factored layers:** all that",
            "transformers says is a warning that weights are newly initialized (MISSING in its load report).",
            "`kvcompress decompress` writes a plain checkpoint, as large as the base model.",
        ]
    return [*_LOAD, "Without that import the checkpoint loads as the base model, with an uncompressed cache."]


def _quantized(base: Mapping[str, Any]) -> list[str]:
    return [
        f"The weights are the base model's, quantized by {method_of(base)}.",
        *_LOAD,
        "**Without that import the model is loaded with weights that lack their scales**, and transformers only warns.",
        "`kvcompress decompress` writes the base model as it was.",
    ]
