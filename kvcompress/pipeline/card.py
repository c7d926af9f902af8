"""The model card of a compressed checkpoint."""

from __future__ import annotations

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.recipe import Recipe


def model_card(manifest: Manifest, recipe: Recipe) -> str:
    """Markdown: what was done, what it saves, how to serve it. Quality is added by whoever measures it."""
    size = manifest.bytes_per_token
    calibration = manifest.calibration
    errors = [layer["relative_error"] for layer in manifest.layers if "relative_error" in layer]
    plain = [layer["index"] for layer in manifest.layers if layer["k"] is None]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [kvcompress, kv-cache, long-context]",
        "---",
        f"# {manifest.parent.source}, KV cache compressed {size.ratio:.2f}x",
        "",
        f"Made with kvcompress {manifest.kvcompress_version} from `{manifest.parent.source}`. The weights",
        "are unchanged; the key-value cache is stored in fewer bytes.",
        "",
        "| | base | compressed |",
        "| --- | --- | --- |",
        f"| KV cache, bytes per token | {size.base:,} | {size.compressed:,} |",
        "",
        f"Error of the attention output on calibration text, mean over layers: {sum(errors) / max(1, len(errors)):.4f}",
        f"(largest {max(errors, default=0.0):.4f}). Calibrated on {calibration.tokens if calibration else 0:,} tokens "
        f"of `{calibration.name if calibration else 'nothing'}`.",
        *([f"Layers left uncompressed (sliding window): {', '.join(map(str, plain))}."] if plain else []),
        "",
        "## Use",
        "",
        "```",
        "vllm serve THIS_FOLDER        # with kvcompress installed beside vLLM",
        "kvcompress verify THIS_FOLDER",
        "```",
        "",
        "Without the plug-in the checkpoint loads as the base model, with an uncompressed cache.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
