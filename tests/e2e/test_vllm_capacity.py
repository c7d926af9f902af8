"""The plan's bytes are vLLM's blocks: floor(pool / predicted bytes of a page), for recipes of every form of cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from tests import require
from tests.e2e import vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
BLOCK_SIZE = 64
GEAR_BLOCK_SIZE = 128
"""One layer's ring shares blocks with all layers' pages, which are the smaller part only in a model this small."""
BLOCKS = 2000
"""So many that a page of other size would show: one byte per token is more than a block."""


def _blocks(engine: dict[str, Any]) -> dict[str, Any]:
    """In the child: what vLLM allocates."""
    from vllm import LLM

    llm = LLM(**engine)
    return {"blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}


@pytest.mark.parametrize("name", ["balanced", "aggressive", "xkv-values", "xkv", "gear", "transmla"])
def test_blocks_are_those_of_the_plan(name: str, base_model: Path, tmp_path: Path) -> None:
    made = recipes.load(RECIPES / f"{name}.yaml", registry.schemas())
    plan = compressing.compress(
        str(base_model), made, tmp_path / "out", compressing.Options(samples=4, length=96), lambda *_: None
    )
    block_size = GEAR_BLOCK_SIZE if name == "gear" else BLOCK_SIZE
    page = block_size * plan.bytes_per_token
    assert plan.bytes_per_token < plan.base_bytes_per_token
    for pool, blocks in ((BLOCKS * page, BLOCKS), (BLOCKS * page - 1, BLOCKS - 1)):
        # The dtype that vLLM chooses for a checkpoint in float32: what is not coded is counted in 16 bits.
        engine = vllm_engine.ENGINE | {"model": str(tmp_path / "out"), "block_size": block_size, "dtype": "auto"}
        found = vllm_engine.in_child(_blocks, engine=engine | {"kv_cache_memory_bytes": pool})
        assert found["blocks"] == blocks == pool // page
