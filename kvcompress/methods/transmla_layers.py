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
from kvcompress.methods import layerwise, rorope
from kvcompress.methods.context import Context
from kvcompress.methods.transmla import Choice, TransMlaConfig, frequencies

PROBES = 2
"""Calibration samples on which candidates are compared."""


def choose(config: TransMlaConfig, context: Context, candidates: Sequence[Choice]) -> Choice:
    """The candidate with the smallest error of the layers' attention outputs, relative, mean over layers.

    Every layer is tried on the base model's own hidden states. Folding goes on doubling while the error falls.
    """
    if len(candidates) == 1:
        return candidates[0]
    errors = layerwise.walk(context, "choice", "choosing RoPE dims", partial(_try_layer, config, context, candidates))
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
    """Convert every layer in order; its tensors are in scratch afterwards (`file_of`). One record per layer.

    A record has the frequencies kept and the relative error of the attention output on the probes.
    """
    return layerwise.walk(context, "layer", "converting layers", partial(_convert_layer, config, context, choice))


def file_of(index: int) -> str:
    """Scratch name of one converted layer's tensors, by their names in self_attn."""
    return layerwise.tensors_file("layer", index)


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
        k_up_HDC[..., :rank] = rorope.undo_mean(k_up_HDC[..., :rank], mean_F)
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
    index: int,
    hidden_NTC: Tensor,
) -> tuple[list[float], dict[str, Tensor]]:
    with runner.layer(index) as layer:
        moments, _ = _moments(config, context, layer, hidden_NTC)
        errors = []
        for choice in candidates:
            tensors, found = _layer_tensors(config, context, choice, layer, moments, None)
            attention = _attention(config, context, choice, layer, tensors, found)
            errors.append(_error(context, runner, layer, attention, hidden_NTC))
        for sample, offset in enumerate(context.calibration.offsets_N.tolist()):
            hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, None)
    return errors, {}


def _convert_layer(
    config: TransMlaConfig, context: Context, choice: Choice, runner: LayerRunner, index: int, hidden_NTC: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with runner.layer(index) as layer:
        moments, query_QQ = _moments(config, context, layer, hidden_NTC)
        tensors, found = _layer_tensors(config, context, choice, layer, moments, query_QQ)
        base: Any = layer.self_attn
        attention = _attention(config, context, choice, layer, tensors, found)
        record = {"frequencies": found, "error": _error(context, runner, layer, attention, hidden_NTC)}
        layer.self_attn = attention
        try:
            for sample, offset in enumerate(context.calibration.offsets_N.tolist()):
                hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, None)
        finally:
            layer.self_attn = base
    return record, tensors


@torch.no_grad()
def _moments(
    config: TransMlaConfig, context: Context, layer: Any, hidden_NTC: Tensor
) -> tuple[rorope.Moments, Tensor | None]:
    """Moments of keys, values and queries before RoPE; those of all queries together where their rank is cut."""
    geometry, attention = context.geometry, layer.self_attn
    accumulator, query_QQ = rorope.MomentAccumulator(), None
    for hidden_TC in hidden_NTC:
        x = layer.input_layernorm(hidden_TC)
        query, keys, values = (
            stored_linear(projection, x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query_THD = query.unflatten(-1, (geometry.num_heads, geometry.head_dim))
        accumulator.add(query_THD, torch.cat([keys, values], -1), geometry.num_kv_heads)
        if config.q_lora_rank is not None:
            square = query.double().mT @ query.double()
            query_QQ = square if query_QQ is None else query_QQ + square
    return accumulator.moments(attention.o_proj.weight), None if query_QQ is None else query_QQ.cpu()


def _layer_tensors(
    config: TransMlaConfig,
    context: Context,
    choice: Choice,
    layer: Any,
    moments: rorope.Moments,
    query_QQ: Tensor | None,
) -> tuple[dict[str, Tensor], list[float]]:
    """A converted layer's new tensors, in the checkpoint's dtype, and the frequencies of its rotary key."""
    geometry, attention = context.geometry, layer.self_attn
    sizes = rorope.Sizes(geometry.num_kv_heads, geometry.head_dim, choice.rope_dim, choice.rank)
    theta_F = torch.tensor(frequencies(context.checkpoint.config, geometry.head_dim), dtype=torch.float64)
    span = geometry.max_position_embeddings if config.dropped_rope == "mean" else None
    mean_F = _mean_rotation(span, context.checkpoint.config, geometry)
    turned = rorope.rotation(moments, sizes, theta_F, choice.freqfold, config.rotation == "unitary", mean_F)
    weight_ZX = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).double().cpu()
    latent = rorope.latent(moments, turned, sizes, config.whitening, config.balance, mean_F, weight_ZX)
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
    # Layers keep the base model's dtype, and what follows sees the weights as they are stored.
    dtype = str(attention.k_proj.weight.dtype).removeprefix("torch.")
    assert dtype in TORCH_DTYPES.values()
    return {name: stored(tensor, dtype) for name, tensor in made.items()}, latent.frequencies_F.tolist()


class _Converted(nn.Module):
    """Latent attention in a base model's decoder layer: brings its own rotary frequencies."""

    def __init__(self, attention: nn.Module, frequencies_LF: Tensor) -> None:
        super().__init__()
        self.attention, self.frequencies_LF = attention, frequencies_LF

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        output, _weights = self.attention(
            hidden_states, position_embeddings=(position_ids, self.frequencies_LF), attention_mask=None
        )
        return output, None


def _attention(
    config: TransMlaConfig, context: Context, choice: Choice, layer: Any, tensors: dict[str, Tensor], found: list[float]
) -> _Converted:
    """The converted attention of one layer, to be run in place of `layer.self_attn`."""
    from kvcompress.modeling.mla import KVCompressMLAAttention, KVCompressMLAConfig

    geometry, base = context.geometry, layer.self_attn
    query = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(("q_proj", "o_proj"))}
    low_rank = "q_a_proj.weight" in tensors
    state = {name: tensor for name, tensor in query.items() if not (low_rank and name.startswith("q_proj"))}
    device = base.o_proj.weight.device
    state |= {name: tensor.to(device) for name, tensor in tensors.items()}
    model_config = KVCompressMLAConfig(
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        kv_lora_rank=choice.rank,
        qk_rope_head_dim=choice.rope_dim,
        q_lora_rank=config.q_lora_rank if low_rank else None,
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
    return _Converted(attention.eval(), torch.tensor([found], dtype=torch.float32, device=device))


@torch.no_grad()
def _error(
    context: Context, runner: LayerRunner, layer: Any, attention: _Converted, hidden_NTC: Tensor
) -> float:
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
