"""Start from a smaller trained model: its weights, with layers added that do nothing yet."""

import json
from pathlib import Path

from llama import Llama
from safetensors.torch import load_file
from torch import Tensor


def grow(model: Llama, smaller: Path) -> None:
    """Load a Transformers checkpoint of the same widths and fewer layers into `model`.

    New layers are spread over the upper half, where the smaller model's layers would move up. They keep the
    initialisation of `Llama`, whose output projections are zero, so the grown model computes what the smaller one did.

    Raises:
        ValueError: the widths differ, or the checkpoint is deeper than the model.
    """
    config = json.loads((smaller / "config.json").read_text("utf-8"))
    shape = model.shape
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if config[name] != getattr(shape, name):
            raise ValueError(f"{smaller} has {name} {config[name]}; expected {getattr(shape, name)}")
    depth, old_depth = shape.num_hidden_layers, config["num_hidden_layers"]
    if old_depth > depth:
        raise ValueError(f"{smaller} has {old_depth} layers, more than {depth}")
    sources = layer_sources(old_depth, depth)
    found = {
        name.removeprefix("model."): tensor.float() for name, tensor in load_file(smaller / "model.safetensors").items()
    }
    state: dict[str, Tensor] = {}
    for name, fresh in model.state_dict().items():
        parts = name.split(".", 2)
        if parts[0] == "layers":
            source = sources[int(parts[1])]
            state[name] = fresh if source is None else found[f"layers.{source}.{parts[2]}"]
        else:
            state[name] = found[name]
    model.load_state_dict(state)


def layer_sources(old_depth: int, depth: int) -> list[int | None]:
    """Which old layer each layer comes from, None for a new one; new layers are spread downwards from the last."""
    sources: list[int | None] = list(range(old_depth))
    place = old_depth - 1
    for _ in range(depth - old_depth):
        sources.insert(place, None)
        place = max(0, place - 2)
    return sources
