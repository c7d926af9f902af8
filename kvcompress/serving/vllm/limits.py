"""What no compressed layer can do yet, whatever its form. Everything here is checked when the model is built, before
weights load.
"""

from __future__ import annotations

from kvcompress.codec.groups import check_groups
from kvcompress.codec.layout import PART_ALIGNMENT
from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.forms import FORMS
from kvcompress.serving.loading import CANARY, canary_is_asked_for
from kvcompress.serving.vllm import compat


def check_engine(engine: compat.Engine, codec: CodecSpec) -> None:
    """Refuse engine options and models that no layer could serve, and those that a form of the codec's cannot.

    Raises:
        ValueError: naming the option or the difference.
    """
    if engine.num_layers != len(codec.layers):
        raise ValueError(
            f"the codec has {len(codec.layers)} layers and the model {engine.num_layers}; config.json and the codec do "
            "not belong together; compress the model again"
        )
    if not any(codec.layers):
        return  # factored weights alone leave the cache to vLLM
    if engine.uses_mla:
        raise ValueError("the model uses multi-head latent attention (MLA); kvcompress does not serve such models yet")
    if engine.cache_dtype != "auto":
        raise ValueError(
            f"found --kv-cache-dtype {engine.cache_dtype}; the codec decides how the cache is stored; leave the option "
            "at auto"
        )
    if engine.load_format == "dummy" and canary_is_asked_for():
        raise ValueError(
            "found --load-format dummy; the codec does not fit the keys and values of random weights, and the start-up "
            f"canary would say so; leave the option out, or to measure time alone set {CANARY}=0"
        )
    if engine.block_size % PART_ALIGNMENT:
        raise ValueError(
            f"found --block-size {engine.block_size}; compressed pages need a multiple of {PART_ALIGNMENT}, such as "
            f"{-(-engine.block_size // PART_ALIGNMENT) * PART_ALIGNMENT}"
        )
    check_groups(codec.layers)
    for form in sorted({layer.form for layer in codec.layers if layer is not None}):
        FORMS[form].serving("vllm").check(engine, codec)
    for kind in ("decode", "prefill"):
        if (size := getattr(engine, f"{kind}_context_parallel_size")) > 1:
            flag = f"--{kind}-context-parallel-size"
            raise ValueError(f"found {flag} {size}; a compressed cache is not split over context; leave it at 1")


def check_layer(layer: compat.Layer, codec: CacheSpec, engine: compat.Engine) -> None:
    """Refuse an attention layer that has a codec and a feature the compressed path lacks.

    Raises:
        ValueError: naming the layer and the feature.
    """
    if layer.features:
        raise ValueError(
            f"{layer.name} has a codec but {layer.features[0]}, which a compressed cache does not serve; "
            "compress the model again with this layer left out"
        )
    if (engine.num_kv_heads, layer.head_size) != (codec.num_kv_heads, codec.head_dim):
        raise ValueError(
            f"{layer.name} has {engine.num_kv_heads} KV heads of {layer.head_size} channels; its codec was made for "
            f"{codec.num_kv_heads} of {codec.head_dim}; compress this model again"
        )
