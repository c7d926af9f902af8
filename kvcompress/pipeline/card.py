"""The model card of a compressed checkpoint."""

from __future__ import annotations

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.recipe import Recipe


def model_card(manifest: Manifest, recipe: Recipe) -> str:
    """Markdown: what was done, what it saves, how to serve it. Quality is added by whoever measures it."""
    size = manifest.bytes_per_token
    calibration = manifest.calibration
    errors = [layer["relative_error"] for layer in manifest.layers if "relative_error" in layer]
    latent = recipe.stage("attention") is not None
    plain = [] if latent else [layer["index"] for layer in manifest.layers if layer["k"] is None]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [kvcompress, kv-cache, long-context]",
        "---",
        f"# {manifest.parent.source}, KV cache compressed {size.ratio:.2f}x",
        "",
        f"Made with kvcompress {manifest.kvcompress_version} from `{manifest.parent.source}`. "
        + (
            "Attention keeps one latent vector per token for all heads, in converted weights."
            if latent
            else "The weights\nare unchanged; the key-value cache is stored in fewer bytes."
        ),
        "",
        "| | base | compressed |",
        "| --- | --- | --- |",
        f"| KV cache, bytes per token | {size.base:,} | {size.compressed:,} |",
        "",
        *(
            [
                "Error of the attention output on calibration text, mean over layers: "
                f"{sum(errors) / len(errors):.4f}\n(largest {max(errors):.4f})."
            ]
            if errors
            else []
        ),
        f"Calibrated on {calibration.tokens if calibration else 0:,} tokens "
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
        "In transformers: `kvcompress.modeling.register()`, then `AutoModelForCausalLM.from_pretrained(...)`."
        if latent
        else "Without the plug-in the checkpoint loads as the base model, with an uncompressed cache.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.text.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
