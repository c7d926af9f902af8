"""Whether a checkpoint has every tensor of its model, in the shape that config.json gives it; from headers alone.

An engine that is handed fewer tensors serves what its memory held before, and calibration reads only a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvcompress.checkpoint.paths import quote
from kvcompress.checkpoint.reader import CONFIG_FILE, HEAD, Checkpoint
from kvcompress.model_config import DecoderConfig, parse

EMBEDDING = "model.embed_tokens.weight"
_BIAS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.bias")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Shape = tuple[int, ...]


def check_complete(checkpoint: Checkpoint) -> None:
    """Compare the tensors of a model's checkpoint with its config.json.

    Raises:
        ValueError: naming the first tensor that is missing or of another shape, a bias that the model
            would not add, or that belongs to a layer which config.json does not have.
    """
    config = parse(checkpoint.config)
    found = checkpoint.tensors
    expected = dict(expected_tensors(config))
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(_incomplete(checkpoint, config, missing, expected[missing[0]]))
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{checkpoint.path}: {name} has shape {list(found[name].shape)}, and {CONFIG_FILE} asks for "
                f"{list(shape)}; they are not of the same model, or one was edited"
            )
    for name in found:
        if _BIAS.fullmatch(name) and name not in expected:
            key = "attention_bias" if ".self_attn." in name else "mlp_bias"
            raise ValueError(
                f"{checkpoint.path} has {quote(name)}, which a {config.architecture} with this {CONFIG_FILE} does not "
                f"add; correct {key} or architectures, or remove the tensor if the model was trained without"
            )
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            raise ValueError(
                f"{checkpoint.path} has {quote(name)}, and {CONFIG_FILE} has num_hidden_layers "
                f"{config.num_hidden_layers}: no engine would load that layer; correct num_hidden_layers"
            )


def expected_tensors(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of all tensors of a model of one of the supported families, in the model's order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    family = config.family
    qkv_bias = config.attention_bias if family.qkv_bias is None else family.qkv_bias
    o_bias = config.attention_bias if family.o_bias is None else family.o_bias
    linears = {
        "self_attn.q_proj": (queries, hidden, qkv_bias),
        "self_attn.k_proj": (keys, hidden, qkv_bias),
        "self_attn.v_proj": (keys, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, queries, o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    yield EMBEDDING, (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, (outputs, inputs, bias) in linears.items():
            yield f"{prefix}{name}.weight", (outputs, inputs)
            if bias:
                yield f"{prefix}{name}.bias", (outputs,)
        for name, size in norms.items():
            yield f"{prefix}{name}.weight", (size,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, hidden)


def _incomplete(checkpoint: Checkpoint, config: DecoderConfig, missing: list[str], shape: Shape) -> str:
    first = missing[0]
    inner = first.removeprefix("model.")
    named = next((name for name in checkpoint.tensors if name.endswith(f".{inner}") or name == inner), None)
    if named is not None:
        return (
            f"{checkpoint.path} has {quote(named)} where a {config.architecture} has {first}: its names have another "
            "prefix; save the model on its own, with its head (AutoModelForCausalLM and save_pretrained)"
        )
    if missing == [HEAD]:
        return (
            f"{checkpoint.path} has no {HEAD}, and {CONFIG_FILE} does not say that it is tied to the embedding; "
            'download the checkpoint again, or set "tie_word_embeddings": true if the model was trained so'
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{checkpoint.path} has no tensor {first} {list(shape)}{more}, which a {config.architecture} with this "
        f"{CONFIG_FILE} needs; download the checkpoint again"
    )
