"""Which of a model's parameters a checkpoint still owes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests import require

require.need("vllm")

from kvcompress.serving.vllm.compat import complete

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "o_proj": ["o_proj"]}


class Model(nn.Module):
    """Loads what it is given, by name; its output embedding is its input embedding."""

    packed_modules_mapping = MERGED

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(4, 2), nn.LayerNorm(2, bias=False)
        self.lm_head = nn.Linear(2, 4, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def load_weights(self, stored: Iterator[tuple[str, Tensor]]) -> set[str]:
        return {name for name, _ in stored}


def test_a_whole_checkpoint_loads_and_may_be_updated_in_parts_later() -> None:
    model = Model()
    complete.require_all(model, (), "model-4x")
    assert model.load_weights((name, torch.ones(1)) for name in ("embed_tokens.weight", "norm.weight"))
    assert model.load_weights((name, torch.ones(1)) for name in ("norm.weight",)) == {"norm.weight"}


@pytest.mark.parametrize("missing", ["embed_tokens.weight", "norm.weight"])
def test_a_parameter_that_is_not_there_is_named(missing: str) -> None:
    model = Model()
    complete.require_all(model, (), "model-4x")
    with pytest.raises(ValueError, match=f"^model-4x lacks {missing}.* uninitialised memory"):
        model.load_weights((name, torch.ones(1)) for name in ("embed_tokens.weight", "norm.weight") if name != missing)


def test_every_part_of_a_merged_layer_is_needed() -> None:
    layer = "model.layers.0."
    whole = {f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    whole |= {f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")} | {f"{layer}self_attn.o_proj.weight"}
    assert complete.missing_parts(whole, MERGED, ()) == []
    for name in whole - {f"{layer}self_attn.o_proj.weight"}:
        assert complete.missing_parts(whole - {name}, MERGED, ()) == [name]
    factored = f"{layer}self_attn.k_proj"
    rest = whole - {f"{factored}.weight"}
    assert complete.missing_parts(rest | {f"{factored}.down_weight"}, MERGED, (factored,)) == []
