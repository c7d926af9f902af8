"""Every feature that a compressed cache lacks is refused when the model is built, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import require, tiny

require.need("vllm")

from kvcompress.serving.vllm import compat, limits
from tests.serving.vllm.engines import engine

LAYER = tiny.mixed_spec().layers[0]
NAME = "model.layers.0.self_attn.attn"
DECODER, CROSS, ENCODER = "decoder", "encoder_decoder", "encoder_only"


def layer(kind: type = compat.Attention, **changes: Any) -> compat.Layer:
    """An attention layer with the attributes vLLM has set when it asks us, without building an engine around it."""
    found = kind.__new__(kind)
    torch.nn.Module.__init__(found)
    attributes = {
        "layer_name": NAME,
        "num_heads": 4,
        "num_kv_heads": tiny.NUM_KV_HEADS,
        "attn_type": DECODER,
        "sliding_window": None,
        "use_alibi_sqrt": False,
        "has_sink": False,
        "use_mm_prefix": False,
        "kv_sharing_target_layer_name": None,
        "head_size": tiny.HEAD_DIM,
        "head_size_v": tiny.HEAD_DIM,
        "kv_cache_dtype": "auto",
    }
    for name, value in (attributes | {"impl": stock()} | changes).items():
        setattr(found, name, value)
    return compat.Layer.of(found)


def stock(**changes: Any) -> Any:
    """vLLM's own implementation of a layer."""
    return SimpleNamespace(**{"scale": 0.25, "alibi_slopes": None, "logits_soft_cap": 0} | changes)


def test_an_ordinary_engine_and_layer_pass() -> None:
    limits.check_engine(engine(), tiny.mixed_spec())
    limits.check_layer(layer(), LAYER, engine())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 5}, "codec has 4 layers and the model 5"),
        ({"uses_mla": True}, "multi-head latent attention"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"cache_dtype": "bfloat16"}, "leave the option at auto"),
        ({"block_size": 40}, "--block-size 40; .* such as 48"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
    ],
)
def test_engine_options_that_cannot_be_honoured(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        limits.check_engine(engine(**change), tiny.mixed_spec())


class _ChunkedAttention(compat.Attention):
    """Stands for vLLM's subclasses of its attention layer."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": _ChunkedAttention}, "is a _ChunkedAttention layer"),
        ({"attn_type": CROSS}, "does encoder_decoder attention"),
        ({"attn_type": ENCODER}, "does encoder_only attention"),
        ({"sliding_window": 128}, "sliding window of 128 tokens"),
        ({"impl": stock(alibi_slopes=[0.5])}, "ALiBi"),
        ({"use_alibi_sqrt": True}, "ALiBi"),
        ({"impl": stock(logits_soft_cap=50.0)}, "caps its attention logits"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mm_prefix": True}, "image tokens"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "shares another layer's cache"),
        ({"head_size_v": 16}, "values of another size"),
        ({"kv_cache_dtype": "fp8"}, "stores its cache as fp8"),
    ],
)
def test_layer_features_that_are_not_served(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{NAME} has a codec but .*{reason}"):
        limits.check_layer(layer(**change), LAYER, engine())


def test_a_codec_made_for_other_heads() -> None:
    with pytest.raises(ValueError, match="2 KV heads of 64 channels; its codec was made for 2 of 32"):
        limits.check_layer(layer(head_size=64, head_size_v=64), LAYER, engine())
    with pytest.raises(ValueError, match="8 KV heads of 32 channels; its codec was made for 2 of 32"):
        limits.check_layer(layer(), LAYER, engine(num_kv_heads=8))
