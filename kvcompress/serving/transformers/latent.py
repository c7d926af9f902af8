"""Form `latent` under transformers: the model class (`modeling.mla`) computes what is cached, so any cache holds it."""

from __future__ import annotations

from kvcompress.serving.transformers.layer import CompressedLayer


class LatentLayer(CompressedLayer):
    """An ordinary layer of the model's latents."""
