"""Every feature that a compressed cache lacks is refused when the model is built, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import require, tiny

require.need("vllm")

from kvcompress.serving.vllm import compat, limits

LAYER = tiny.mixed_spec().layers[0]
NAME = "model.layers.0.self_attn.attn"


def config(**changes: Any) -> Any:
    """As much of a VllmConfig as is looked at, with changes by section and attribute, `cache_config__block_size=8`."""
    sections = {
        "model_config": {
            "hf_text_config": SimpleNamespace(num_hidden_layers=tiny.NUM_LAYERS),
            "use_mla": False,
            "get_total_num_kv_heads": lambda: tiny.NUM_KV_HEADS,
        },
        "cache_config": {"cache_dtype": "auto", "block_size": 32},
        "load_config": {"load_format": "auto"},
        "parallel_config": {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1},
    }
    for path, value in changes.items():
        section, attribute = path.split("__")
        assert attribute in sections[section]
        sections[section][attribute] = value
    return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in sections.items()})


def layer(kind: type = compat.Attention, **changes: Any) -> Any:
    """An attention layer with the attributes vLLM has set when it asks us, without building an engine around it."""
    found = kind.__new__(kind)
    torch.nn.Module.__init__(found)
    attributes = {
        "attn_type": compat.AttentionType.DECODER,
        "sliding_window": None,
        "use_alibi_sqrt": False,
        "has_sink": False,
        "use_mm_prefix": False,
        "kv_sharing_target_layer_name": None,
        "head_size": tiny.HEAD_DIM,
        "head_size_v": tiny.HEAD_DIM,
        "kv_cache_dtype": "auto",
        "impl": SimpleNamespace(alibi_slopes=None, logits_soft_cap=0),
    }
    for name, value in (attributes | changes).items():
        setattr(found, name, value)
    return found


def test_an_ordinary_engine_and_layer_pass() -> None:
    limits.check_engine(config(), tiny.mixed_spec())
    limits.check_layer(layer(), NAME, LAYER, config())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_config__hf_text_config": SimpleNamespace(num_hidden_layers=5)}, "codec has 4 layers and the model 5"),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"load_config__load_format": "dummy"}, "--load-format dummy"),
        ({"cache_config__cache_dtype": "bfloat16"}, "leave the option at auto"),
        ({"cache_config__block_size": 40}, "--block-size 40; .* such as 48"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
    ],
)
def test_engine_options_that_cannot_be_honoured(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        limits.check_engine(config(**change), tiny.mixed_spec())


class _ChunkedAttention(compat.Attention):
    """Stands for vLLM's subclasses of its attention layer."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": _ChunkedAttention}, "is a _ChunkedAttention layer"),
        ({"attn_type": compat.AttentionType.ENCODER_DECODER}, "does encoder_decoder attention"),
        ({"attn_type": compat.AttentionType.ENCODER_ONLY}, "does encoder_only attention"),
        ({"sliding_window": 128}, "sliding window of 128 tokens"),
        ({"impl": SimpleNamespace(alibi_slopes=[0.5], logits_soft_cap=None)}, "ALiBi"),
        ({"use_alibi_sqrt": True}, "ALiBi"),
        ({"impl": SimpleNamespace(alibi_slopes=None, logits_soft_cap=50.0)}, "caps its attention logits"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mm_prefix": True}, "image tokens"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "shares another layer's cache"),
        ({"head_size_v": 16}, "values of another size"),
        ({"kv_cache_dtype": "fp8"}, "stores its cache as fp8"),
    ],
)
def test_layer_features_that_are_not_served(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{NAME} has a codec but .*{reason}"):
        limits.check_layer(layer(**change), NAME, LAYER, config())


def test_a_codec_made_for_other_heads() -> None:
    with pytest.raises(ValueError, match="2 KV heads of 64 channels; its codec was made for 2 of 32"):
        limits.check_layer(layer(head_size=64, head_size_v=64), NAME, LAYER, config())
    with pytest.raises(ValueError, match="8 KV heads of 32 channels; its codec was made for 2 of 32"):
        limits.check_layer(layer(), NAME, LAYER, config(model_config__get_total_num_kv_heads=lambda: 8))
