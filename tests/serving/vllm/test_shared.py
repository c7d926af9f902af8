"""What layers that share a latent, and those that factor each prompt, refuse of an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.spec import CacheSpec, CodecSpec
from tests import require, tiny

require.need("vllm")

from kvcompress.serving.vllm import limits, shared
from tests.serving.vllm import canary_layers, engines

WHOLE = tuple(range(tiny.NUM_LAYERS))


def specs(**changes: Any) -> CodecSpec:
    """Of a model whose layers are one group."""
    [first, *_], _ = canary_layers.make("shared")
    layers = [replace(first.codec.spec, group=WHOLE, place=place, **changes) for place in WHOLE]  # type: ignore[type-var]
    return CodecSpec(tuple(layers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2; .* is not divided over ranks"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2; .* must run in one process"),
        ({"ubatching": True}, "--enable-dbo"),
    ],
)
def test_engine_options_it_lacks_are_refused(change: dict[str, Any], message: str) -> None:
    limits.check_engine(engines.engine(), specs())
    with pytest.raises(ValueError, match=message):
        limits.check_engine(engines.engine(**change), specs())


def test_exact_ends_and_groups_that_are_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps the first 3 and the newest 0 tokens as they are"):
        limits.check_engine(engines.engine(), specs(sink=3))
    with pytest.raises(ValueError, match="does not fit its group"):
        limits.check_engine(engines.engine(), CodecSpec((None, *specs().layers[1:])))


def test_another_rotation_is_refused() -> None:
    [served, *_], _ = canary_layers.make("shared")
    turned = engines.engine(text_config=LlamaConfig(head_dim=canary_layers.HEAD_DIM, rope_theta=2e4))
    with pytest.raises(ValueError, match=r"layers.0.attn's codec was made for another rotary embedding"):
        shared.attach(served.layer, served.codec, turned, [])


def test_a_basis_of_each_prompt_is_refused() -> None:
    sizes = {"k_rank": 8, "v_rank": 8, "element_bytes": 4}
    layers: list[CacheSpec] = [
        PromptSpec(tiny.NUM_KV_HEADS, tiny.HEAD_DIM, WHOLE, place, "kv", **sizes) for place in WHOLE
    ]
    with pytest.raises(ValueError, match="finds its basis in each prompt"):
        limits.check_engine(engines.engine(), CodecSpec(tuple(layers)))
