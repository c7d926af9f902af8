"""Runs a checkpoint one decoder layer at a time and shows each layer's queries, keys and values to a collector.

Only the layer at work and the hidden states of the calibration samples are in memory. Any transformers decoder fits
that has a list of layers, one rotary embedding and the attention-function interface; its family says what they are
called, and what else there is to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.corpus import Calibration
from kvcompress.calibration.overflow import is_finite, refuse_overflow
from kvcompress.checkpoint.quantized import read_weight
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.rows import read_rows
from kvcompress.families import family_of
from kvcompress.modeling.config import load_config
from kvcompress.modeling.low_rank import LowRankLinear, ranks_of, replace_linears

Collector = Callable[[Tensor, Tensor, Tensor, float], None]
"""Called with post-RoPE query_BHTD, key_BHTD, value_BHTD and the softmax scale."""

_ATTENTION = "kvcompress_capture"

_MATRICES = ("weight", "up_weight", "down_weight")
_CAST_BYTES = 4 << 20
"""Weights cast to the computing dtype at a time."""


class LayerRunner:
    """The decoder layers of a checkpoint, materialised one by one."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        _register_attention()
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.family, self.names = family_of(checkpoint.config), family_of(checkpoint.config).names
        config = load_config(checkpoint.path)
        config._attn_implementation = _ATTENTION
        self.config = config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            replace_linears(model, ranks_of(checkpoint.config))
        self.model = model
        self._layers = model.get_submodule(self.names.layers)
        self._index = 0
        for module in self._layers.modules():
            if _is_linear(module):
                module.forward = partial(stored_linear, module)
        # Rotary tables are computed, not stored, so they cannot stay on the meta device.
        self.rotary = type(model.get_submodule(self.names.rotary))(config.get_text_config()).to(self.device)

    def embed(self, calibration: Calibration) -> Tensor:
        """Hidden states before the first layer, `[samples, length, hidden]`. Reads only the rows that occur."""
        tokens_NT = torch.from_numpy(calibration.tokens_NT)
        used, inverse = tokens_NT.unique(return_inverse=True)
        name = f"{self.names.embedding}.weight"
        rows_UC = read_rows(self.checkpoint, name, used).to(self.device, self.dtype)
        if not is_finite(rows_UC):
            dtype = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{name} has values that {dtype} cannot hold; use --dtype float32 or bfloat16")
        if self.family.embedding_scale:
            rows_UC *= self.number(self.family.embedding_scale)
        return rows_UC[inverse.to(self.device)]

    def number(self, key: str) -> float:
        """A factor that config.json has under this key, rounded to the computing dtype as transformers does."""
        config = self.config.get_text_config()
        value = config.hidden_size**0.5 if key == "sqrt(hidden_size)" else float(getattr(config, key))
        return float(torch.tensor(value, dtype=self.dtype))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights as stored; they are released on leaving.

        Computing in float32 must not take a float32 copy of the layer: linear layers cast a few rows at a time.
        Quantized weights are dequantized here; how the base model quantizes activations is left out.

        Raises:
            ValueError: the checkpoint lacks one of its tensors.
        """
        layer: nn.Module = self._layers.get_submodule(str(index))
        self._index = index
        prefix = self.names.layer(index)
        linears = [name for name, module in layer.named_modules() if _is_linear(module)]
        matrices = {f"{name}.{part}" for name in linears for part in _MATRICES}
        state = {}
        for name, parameter in layer.state_dict().items():
            tensor = self._read(prefix + name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{prefix}{name} has shape {tuple(tensor.shape)}; config.json asks for {tuple(parameter.shape)}"
                )
            # What is no linear layer has no product that casts: norms would give activations another dtype.
            state[name] = tensor.to(self.device, tensor.dtype if name in matrices else self.dtype)
        layer.load_state_dict(state, assign=True)
        layer.eval().requires_grad_(False)
        try:
            yield layer
        finally:
            layer.to("meta")

    def _read(self, name: str) -> Tensor:
        """One tensor as transformers' model has it: experts are stacked there."""
        parts = self.family.stored(name)
        if parts == (name,):
            return read_weight(self.checkpoint, name, self.dtype)
        experts: list[Tensor] = []
        while parts[0].replace("*", str(len(experts))) in self.checkpoint.tensors:
            own = (part.replace("*", str(len(experts))) for part in parts)
            experts.append(torch.cat([read_weight(self.checkpoint, part, self.dtype) for part in own]))
        return torch.stack(experts)

    def attention(self, layer: nn.Module) -> Any:
        """A layer's attention."""
        return layer.get_submodule(self.names.attention)

    def output_projection(self, layer: nn.Module) -> nn.Linear | LowRankLinear:
        """The linear map that takes a layer's attention output back to the hidden size."""
        projection: nn.Linear | LowRankLinear = getattr(self.attention(layer), self.names.o)
        return projection

    @torch.no_grad()
    def forward(self, layer: nn.Module, hidden_TC: Tensor, offset: int, collect: Collector | None) -> Tensor:
        """One sample through one layer: hidden states `[length, hidden]` at positions from `offset`.

        Raises:
            ValueError: the layer's output is not finite, naming where that begins.
        """
        output_TC = self._run(layer, hidden_TC, offset, collect)
        if not is_finite(output_TC):
            refuse_overflow(layer, self._index, self.dtype, lambda: self._run(layer, hidden_TC, offset, None))
        return output_TC

    def advance(
        self,
        layer: nn.Module,
        hidden_NTC: Tensor,
        calibration: Calibration,
        collector: Callable[[int, int], Collector | None] | None = None,
    ) -> None:
        """All samples through one layer, in place.

        Args:
            collector: makes the collector of a sample, from its number and its first position.
        """
        for sample, offset in enumerate(calibration.offsets_N.tolist()):
            collect = None if collector is None else collector(sample, offset)
            hidden_NTC[sample] = self.forward(layer, hidden_NTC[sample], offset, collect)

    def backward(self, layer: nn.Module, hidden_TC: Tensor, offset: int, gradient_TC: Tensor) -> Tensor:
        """One sample back through one layer.

        Args:
            hidden_TC: the layer's input, as for `forward`.
            gradient_TC: gradient of a loss by the layer's output.

        Returns:
            Its gradient by the layer's input. Weights get none; hooks on modules and tensors run.
        """
        with torch.enable_grad():
            inputs = hidden_TC.detach().requires_grad_()
            self._run(layer, inputs, offset, None).backward(gradient_TC)
        assert inputs.grad is not None
        return inputs.grad

    def _run(self, layer: nn.Module, hidden_TC: Tensor, offset: int, collect: Collector | None) -> Tensor:
        hidden = hidden_TC[None]
        positions = torch.arange(offset, offset + hidden.shape[1], device=self.device)[None]
        attention = self.attention(layer)
        attention.kvcompress_collect = collect
        try:
            output = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=self.rotary(hidden, positions),
                past_key_values=None,
                use_cache=False,
            )
            if collect is not None and attention.kvcompress_collect is not None:
                raise ValueError(
                    f"{type(self.model).__name__} does not attend through transformers' attention interface, by which "
                    "keys and values are calibrated on; it cannot be compressed"
                )
        finally:
            attention.kvcompress_collect = None
        return output[0] if isinstance(output, Tensor) else output[0][0]


def stored_linear(linear: nn.Linear | LowRankLinear, x: Tensor) -> Tensor:
    """`linear(x)` in the dtype of `x`, whatever dtype the weights are stored in.

    Args:
        x: `[..., in_features]`.
    """
    if isinstance(linear, LowRankLinear):
        return _stored_product(linear.up_weight, linear.bias, _stored_product(linear.down_weight, None, x))
    return _stored_product(linear.weight, linear.bias, x)


def _stored_product(weight_OI: Tensor, bias_O: Tensor | None, x: Tensor) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if weight_OI.dtype == x.dtype:
        return nn.functional.linear(x, weight_OI, bias_O)
    output = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    for rows in cast_rows(weight_OI, x.dtype):
        output[..., rows] = nn.functional.linear(x, weight_OI[rows].to(x.dtype))
    return output if bias_O is None else output.add_(bias_O)


def cast_rows(weight_OI: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of rows that take a few MiB once cast to a dtype."""
    rows = max(1, _CAST_BYTES // (weight_OI.shape[1] * dtype.itemsize))
    return (slice(start, start + rows) for start in range(0, weight_OI.shape[0], rows))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LowRankLinear)


def _register_attention() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Exact causal attention; shows its inputs to the collector on the way. The mask is rebuilt from the window."""
    scale = float(options["scaling"])
    collect: Collector | None = getattr(module, "kvcompress_collect", None)
    if collect is not None:
        collect(query, key, value, scale)
        module.kvcompress_collect = None  # type: ignore[assignment]
    return exact_attention(query, key, value, scale, options.get("sliding_window")).transpose(1, 2), None


def exact_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention of whole sequences, `[batch, query heads, tokens, head_dim]`."""
    tokens = query_BHTD.shape[2]
    mask = None
    if window is not None and window < tokens:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTD.device).tril().triu(1 - window)
    return nn.functional.scaled_dot_product_attention(
        query_BHTD, key_BHTD, value_BHTD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
