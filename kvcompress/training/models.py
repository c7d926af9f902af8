"""Whole models for training, and an attention in which keys and values can be sent through a round trip."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.capture import exact_attention
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.families import family_of

RoundTrip = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Post-RoPE keys and values `[batch, KV heads, tokens, head_dim]` as attention would read them back from a cache."""

ATTENTION = "kvcompress_round_trip"

_INTEGRATION = "kvcompress.serving.transformers"
"""Importing it makes our own checkpoints loadable by transformers. By name: training knows nothing of serving."""


def load_model(checkpoint: Checkpoint, device: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A checkpoint as a transformers model, frozen, in evaluation mode.

    Args:
        attention: name of the attention function; by default transformers' own choice.
    """
    from transformers import AutoModelForCausalLM

    _register()
    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, trust_remote_code=False, **options)
    return model.to(device).eval().requires_grad_(False)


def logits(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of token ids and positions."""

    def forward(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits
        return found

    return forward


def save_activations(model: Any) -> None:
    """Trade time for memory: keep only each layer's input for the backward pass."""
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers recomputes only then; what else training mode does is switched off
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def set_round_trips(model: Any, round_trips: dict[int, RoundTrip]) -> None:
    """Send keys and values of some layers through a round trip, and those of all others straight to attention.

    The model must have been loaded with `attention=ATTENTION`.
    """
    names = family_of({"architectures": [type(model).__name__]}).names
    for index, layer in enumerate(model.get_submodule(names.layers)):
        layer.get_submodule(names.attention).kvcompress_round_trip = round_trips.get(index)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    round_trip: RoundTrip | None = getattr(module, "kvcompress_round_trip", None)
    if round_trip is not None:
        key, value = round_trip(key, value)
    output = exact_attention(query, key, value, float(options["scaling"]), options.get("sliding_window"))
    return output.transpose(1, 2), None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attention
    importlib.import_module(_INTEGRATION)
