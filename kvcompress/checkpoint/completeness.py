"""Whether a checkpoint has every tensor of its model, in the shape that config.json gives it; from headers alone.

An engine that is handed fewer tensors serves what its memory held before, and calibration reads only a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvcompress.checkpoint.paths import quote
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint
from kvcompress.model_config import DecoderConfig

Shape = tuple[int, ...]


def check_complete(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Compare the tensors of a model's checkpoint with its config.json; of a family that we do not know, attention's.

    Raises:
        ValueError: naming the first tensor that is missing or of another shape, a bias that the model
            would not add, or that belongs to a layer which config.json does not have.
    """
    found, names = checkpoint.tensors, config.family.names
    prefix = re.compile(re.escape(names.layers) + r"\.(\d+)\.(.+)")
    biases = {f"{local}.bias" for local in names.linears.values()}
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
        layer = prefix.fullmatch(name)
        if layer and layer[2] in biases and name not in expected and not config.family.tried:
            key = "attention_bias" if layer[2].startswith(names.attention) else "mlp_bias"
            raise ValueError(
                f"{checkpoint.path} has {quote(name)}, which a {config.architecture} with this {CONFIG_FILE} does not "
                f"add; correct {key} or architectures, or remove the tensor if the model was trained without"
            )
        if layer and int(layer[1]) >= config.num_hidden_layers:
            raise ValueError(
                f"{checkpoint.path} has {quote(name)}, and {CONFIG_FILE} has num_hidden_layers "
                f"{config.num_hidden_layers}: no engine would load that layer; correct num_hidden_layers"
            )


def expected_tensors(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of all tensors of a model, in the model's order; of a family that we do not know, the embedding
    and attention's weights.
    """
    hidden, family, names = config.hidden_size, config.family, config.family.names
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    qkv_bias = config.attention_bias if family.qkv_bias is None else family.qkv_bias
    o_bias = config.attention_bias if family.o_bias is None else family.o_bias
    q, k, v, o = names.attention_linears
    attention = {
        q: (queries, hidden, qkv_bias),
        k: (keys, hidden, qkv_bias),
        v: (keys, hidden, qkv_bias),
        o: (hidden, queries, o_bias),
    }
    mlp = _mlp((names.gate, names.up, names.down), hidden, config.intermediate_size, config.mlp_bias)
    norms = {} if family.tried else dict.fromkeys(names.norms, hidden)
    if family.qk_norm:
        widths = (config.head_dim, config.head_dim) if family.qk_norm == "head" else (queries, keys)
        normed = (f"{names.attention}.{name}" for name in (names.q_norm, names.k_norm))
        norms |= dict(zip(normed, widths, strict=True))
    yield f"{names.embedding}.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        prefix = names.layer(index)
        linears = (
            attention if family.tried else attention | (_experts(config) if index in config.expert_layers else mlp)
        )
        for name, (outputs, inputs, bias) in linears.items():
            yield f"{prefix}{name}.weight", (outputs, inputs)
            if bias:
                yield f"{prefix}{name}.bias", (outputs,)
        for name, size in norms.items():
            yield f"{prefix}{name}.weight", (size,)
    if family.tried:
        return
    yield f"{names.norm}.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield f"{names.head}.weight", (config.vocab_size, hidden)


def _mlp(names: tuple[str, str, str], hidden: int, inner: int, bias: bool) -> dict[str, tuple[int, int, bool]]:
    """Outputs, inputs and whether there is a bias, by name."""
    gate, up, down = names
    return {gate: (inner, hidden, bias), up: (inner, hidden, bias), down: (hidden, inner, bias)}


def _experts(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    experts = config.family.experts
    assert experts is not None
    found = {experts.router: (config.num_experts, config.hidden_size, False)}
    for number in range(config.num_experts):
        gate, up, down = (name.replace("*", str(number)) for name in (experts.gate, experts.up, experts.down))
        found |= _mlp((gate, up, down), config.hidden_size, config.expert_size, False)
    return found


def _incomplete(checkpoint: Checkpoint, config: DecoderConfig, missing: list[str], shape: Shape) -> str:
    first = missing[0]
    names = config.family.names
    head, inner = f"{names.head}.weight", first.removeprefix("model.")
    named = next((name for name in checkpoint.tensors if name.endswith(f".{inner}") or name == inner), None)
    if named is not None:
        return (
            f"{checkpoint.path} has {quote(named)} where a {config.architecture} has {first}: its names have another "
            "prefix; save the model on its own, with its head (AutoModelForCausalLM and save_pretrained)"
        )
    if missing == [head]:
        return (
            f"{checkpoint.path} has no {head}, and {CONFIG_FILE} does not say that it is tied to the embedding; "
            'download the checkpoint again, or set "tie_word_embeddings": true if the model was trained so'
        )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{checkpoint.path} has no tensor {first} {list(shape)}{more}, which a {config.architecture} with this "
        f"{CONFIG_FILE} needs; download the checkpoint again"
    )
