"""`transmla` at work on layers: the choice of RoPE dims and folding, the conversion, and the way back.

Imported by `transmla` only when it works: the module needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.capture import LayerRunner, stored_linear
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TORCH_DTYPES
from kvcompress.geometry import ModelGeometry
from kvcompress.methods import rorope, walk
from kvcompress.methods.context import Context, layer_file
from kvcompress.methods.transmla import Choice, TransMlaConfig, attention_prefix, frequencies, kept_frequencies

PROBES = 2
"""Calibration samples on which candidates are compared."""


def choose(config: TransMlaConfig, context: Context, candidates: Sequence[Choice]) -> Choice:
    """The candidate with the smallest error of the layers' attention outputs, relative, mean over layers.

    Every layer is tried on the base model's own hidden states. Folding goes on doubling while the error falls.
    """
    if len(candidates) == 1:
        return candidates[0]
    errors = walk.forward(context, "choice", partial(_try_layer, config, context, candidates), "choosing RoPE dims")
    mean = dict(zip(candidates, torch.tensor(errors, dtype=torch.float64).mean(0).tolist(), strict=True))
    best: dict[int, Choice] = {}
    stopped = set()
    for choice in candidates:
        last = best.get(choice.rope_dim)
        if choice.rope_dim in stopped:
            continue
        if last is None or mean[choice] < mean[last]:
            best[choice.rope_dim] = choice
        else:
            stopped.add(choice.rope_dim)
    return min(best.values(), key=lambda choice: mean[choice])


def convert(config: TransMlaConfig, context: Context, choice: Choice) -> list[dict[str, Any]]:
    """Convert every layer in order; its tensors are in scratch afterwards (`file_of`).

    One record per layer: the relative error of its attention output on the probes.
    """
    return walk.forward(context, "layer", partial(_convert_layer, config, context, choice), "converting layers")


def file_of(index: int) -> str:
    """Scratch name of one converted layer's tensors, by their names in self_attn."""
    return layer_file("layer", index)


def stored(tensor: Tensor, dtype: str) -> Tensor:
    """A result in the checkpoint's dtype, by its torch name."""
    converted: Tensor = tensor.to(getattr(torch, dtype)).contiguous()
    return converted


def restored(checkpoint: Checkpoint, prefix: str, part: str, low: Tensor, geometry: ModelGeometry) -> list[Tensor]:
    """The base model's projections (keys and values, or queries) from their low-rank ones.

    Args:
        low: weight or bias of `part` (kv_a_proj or q_a_proj), float64.
    """
    if part == "q_a_proj":
        up = checkpoint.read(f"{prefix}q_b_proj.weight").double()
        return [up @ low]
    k_up_HDC, v_up_HDR = (checkpoint.read(f"{prefix}{name}").double() for name in ("k_up", "v_up"))
    rank = v_up_HDR.shape[-1]
    mean_F = _mean_rotation(checkpoint.config["dropped_rope_context"], checkpoint.config["base_config"], geometry)
    if mean_F is not None:
        k_up_HDC[..., :rank] = rorope.turn_pairs(k_up_HDC[..., :rank], 1.0 / mean_F)
    return [k_up_HDC.flatten(0, 1) @ low, v_up_HDR.flatten(0, 1) @ low[:rank]]


def _mean_rotation(context: int | None, config: dict[str, Any], geometry: ModelGeometry) -> Tensor | None:
    if context is None:
        return None
    theta_F = torch.tensor(frequencies(config, geometry.head_dim), dtype=torch.float64)
    return rorope.mean_rotation(theta_F, context)


def _try_layer(
    config: TransMlaConfig,
    context: Context,
    candidates: Sequence[Choice],
    runner: LayerRunner,
    layer: Any,
    index: int,
    hidden_NTC: Tensor,
) -> walk.Kept:
    kv_ZZ, _ = _moments(config, context, layer, hidden_NTC)
    errors = []
    for choice in candidates:
        tensors = _layer_tensors(config, context, choice, layer, kv_ZZ, None)
        attention = _attention(context, choice, layer, tensors)
        errors.append(_error(context, runner, layer, attention, hidden_NTC))
    runner.advance(layer, hidden_NTC, context.calibration)
    return walk.Kept(record=errors)


def _convert_layer(
    config: TransMlaConfig,
    context: Context,
    choice: Choice,
    runner: LayerRunner,
    layer: Any,
    index: int,
    hidden_NTC: Tensor,
) -> walk.Kept:
    kv_ZZ, query_QQ = _moments(config, context, layer, hidden_NTC)
    tensors = _layer_tensors(config, context, choice, layer, kv_ZZ, query_QQ)
    base = layer.self_attn
    attention = _attention(context, choice, layer, tensors)
    record = {"error": _error(context, runner, layer, attention, hidden_NTC)}
    layer.self_attn = attention
    try:
        runner.advance(layer, hidden_NTC, context.calibration)
    finally:
        layer.self_attn = base
    return walk.Kept(tensors, record)


@torch.no_grad()
def _moments(config: TransMlaConfig, context: Context, layer: Any, hidden_NTC: Tensor) -> tuple[Tensor, Tensor | None]:
    """E[z z^T] of [keys, values] of all heads before RoPE, and E[q q^T] of all queries where their rank is cut."""
    attention, tokens = layer.self_attn, hidden_NTC.shape[0] * hidden_NTC.shape[1]
    kv_ZZ: Any = 0.0
    query_QQ: Any = 0.0
    for hidden_TC in hidden_NTC:
        x = layer.input_layernorm(hidden_TC)
        kv_TZ = torch.cat([stored_linear(attention.k_proj, x), stored_linear(attention.v_proj, x)], dim=-1).double()
        kv_ZZ = kv_ZZ + kv_TZ.mT @ kv_TZ
        if config.q_lora_rank is not None:
            query_TQ = stored_linear(attention.q_proj, x).double()
            query_QQ = query_QQ + query_TQ.mT @ query_TQ
    return (kv_ZZ / tokens).cpu(), None if config.q_lora_rank is None else (query_QQ / tokens).cpu()


def _layer_tensors(
    config: TransMlaConfig,
    context: Context,
    choice: Choice,
    layer: Any,
    kv_ZZ: Tensor,
    query_QQ: Tensor | None,
) -> dict[str, Tensor]:
    """A converted layer's new tensors, by their names in self_attn, in the checkpoint's dtype."""
    geometry, attention = context.geometry, layer.self_attn
    sizes = rorope.Sizes(geometry.num_kv_heads, geometry.head_dim, choice.rope_dim, choice.rank)
    span = geometry.context if config.dropped_rope == "mean" else None
    mean_F = _mean_rotation(span, context.checkpoint.config, geometry)
    map_KK = rorope.rotation(kv_ZZ, sizes, choice.freqfold, config.rotation == "unitary")
    weight_ZX = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).double().cpu()
    second_ZZ = kv_ZZ if config.whitening == "activation" else weight_ZX @ weight_ZX.mT
    latent = rorope.latent(kv_ZZ, second_ZZ, map_KK, sizes, config.balance, mean_F)
    made = {"kv_a_proj.weight": latent.down_CZ @ weight_ZX, "k_up": latent.k_up_HDC, "v_up": latent.v_up_HDR}
    if attention.k_proj.bias is not None:
        biases = torch.cat([attention.k_proj.bias, attention.v_proj.bias]).double().cpu()
        made["kv_a_proj.bias"] = latent.down_CZ @ biases
    if config.q_lora_rank is not None and query_QQ is not None:
        axes_QR = rorope.leading_axes(query_QQ, config.q_lora_rank)
        made["q_a_proj.weight"] = axes_QR.mT @ attention.q_proj.weight.double().cpu()
        made["q_b_proj.weight"] = axes_QR
        if attention.q_proj.bias is not None:
            made["q_a_proj.bias"] = axes_QR.mT @ attention.q_proj.bias.double().cpu()
    # Tensors keep the dtype of those they are made of, and what follows sees them as they are stored.
    base = attention_prefix(attention.layer_idx)

    def dtype_of(name: str) -> str:
        kind = "bias" if name.endswith(".bias") else "weight"
        return TORCH_DTYPES[
            context.checkpoint.tensors[f"{base}{'q' if name.startswith('q_') else 'k'}_proj.{kind}"].dtype
        ]

    return {name: stored(tensor, dtype_of(name)) for name, tensor in made.items()}


class _Converted(nn.Module):
    """Latent attention in a base model's decoder layer: brings its own rotary embedding."""

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        embeddings = self.rotary(hidden_states, position_ids)
        return self.attention(hidden_states, position_embeddings=embeddings, attention_mask=None)[0], None


def _attention(context: Context, choice: Choice, layer: Any, tensors: dict[str, Tensor]) -> _Converted:
    """The converted attention of one layer, to be run in place of `layer.self_attn`."""
    from kvcompress.modeling.mla import KVCompressMLAAttention, KVCompressMLAConfig, KVCompressMLARotary

    geometry, base = context.geometry, layer.self_attn
    query_rank = tensors["q_a_proj.weight"].shape[0] if "q_a_proj.weight" in tensors else None
    kept = ("o_proj", "q_proj") if query_rank is None else ("o_proj",)
    state = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(kept)}
    state |= {name: tensor.to(base.o_proj.weight.device) for name, tensor in tensors.items()}
    theta = frequencies(context.checkpoint.config, geometry.head_dim)
    model_config = KVCompressMLAConfig(
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        kv_lora_rank=choice.rank,
        qk_rope_head_dim=choice.rope_dim,
        q_lora_rank=query_rank,
        rope_frequencies=kept_frequencies(theta, choice.rope_dim, geometry.head_dim, choice.freqfold),
        softmax_scale=geometry.head_dim**-0.5,
        qkv_bias=base.k_proj.bias is not None,
        o_bias=base.o_proj.bias is not None,
    )
    model_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        attention = KVCompressMLAAttention(model_config, 0)
    attention.load_state_dict(state, assign=True)
    for module in attention.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(stored_linear, module)  # type: ignore[method-assign]
    return _Converted(attention.eval(), KVCompressMLARotary(model_config))


@torch.no_grad()
def _error(context: Context, runner: LayerRunner, layer: Any, attention: _Converted, hidden_NTC: Tensor) -> float:
    """Relative error of the attention output after o_proj, on the last samples."""
    error = energy = 0.0
    for hidden_TC, offset in list(zip(hidden_NTC, context.calibration.offsets_N.tolist(), strict=True))[-PROBES:]:
        x = layer.input_layernorm(hidden_TC[None])
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)[None]
        layer.self_attn.kvcompress_collect = None
        exact = layer.self_attn(
            hidden_states=x,
            position_embeddings=runner.rotary(x, positions),
            attention_mask=None,
            past_key_values=None,
        )[0]
        made = attention(hidden_states=x, position_ids=positions)[0]
        error += float((made - exact).square().sum())
        energy += float(exact.square().sum())
    return float((error / max(energy, 1e-30)) ** 0.5)
