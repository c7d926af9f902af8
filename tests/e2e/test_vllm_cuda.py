"""vLLM on the CUDA kernels: their emulation and the CPU's memory in the place of a GPU's.

Everything else is what a GPU would run: pages in fragment order, metadata that stays on the device, kernels for steps
of few queries and torch for chunks of prompts.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.heads.cuda import CudaHeads
from tests import require, tiny
from tests.e2e import reference, vllm_engine
from tests.ops import emulated

require.need("vllm")
pytestmark = pytest.mark.e2e

BLOCK = 64
LENGTHS = [5, 60, 125, 150]
TOKENS = 10
# Chunks of more queries than the kernels take and of fewer; the prompts fill all blocks, and two answers need one more.
PRESSED = {"block_size": BLOCK, "max_num_batched_tokens": 96, "num_gpu_blocks_override": 8}

CALLS = ("append", "attend_latents", "read")
"""What kernels do for a layer."""

MARGIN = 0.05
"""Queries and weights of the kernels are halves, which moved logits by up to 0.0035 standard deviations."""


def spec() -> CodecSpec:
    """A layer without a codec; others in bands, in floats, and with outliers."""
    sides = [
        (SideSpec((Band(8, 8), Band(4, 8), Band(2, 8))), SideSpec((Band(8, 8), Band(4, 16)), 2)),
        None,
        (SideSpec((Band(16, tiny.HEAD_DIM),)), SideSpec((Band(8, tiny.HEAD_DIM),))),
        (SideSpec((Band(8, 16), Band(4, 16)), 1), SideSpec((Band(8, 16), Band(4, 8)))),
    ]
    heads = (tiny.NUM_KV_HEADS, tiny.HEAD_DIM)
    return CodecSpec(tuple(None if pair is None else HeadsSpec(*heads, *pair) for pair in sides))


def serve(scenario: dict[str, Any]) -> dict[str, Any]:
    """`vllm_engine.generate` in a process whose memory counts as a GPU's; adds how often each kernel was called."""
    calls: collections.Counter[str] = collections.Counter()
    gpu.kernels = lambda device: cuda_library.load()
    for name in CALLS:
        setattr(CudaHeads, name, counted(name, calls))
    return vllm_engine.generate(scenario) | {"calls": calls}


def counted(name: str, calls: collections.Counter[str]) -> Any:
    function = getattr(CudaHeads, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return counting


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    require.need("compiler")
    found = emulated.library("sm_90")
    assert found is not None
    return {cuda_library.PATH_VARIABLE: str(found._name)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    return tiny.save_compressed(tiny.save_model(folder / "base"), folder / "compressed", spec())


def test_same_tokens_in_chunks_after_preemption_and_from_the_prefix_cache(model: Path, env: dict[str, str]) -> None:
    prompts, expected = reference.greedy(model, LENGTHS, TOKENS, margin=MARGIN)
    served = vllm_engine.run(model, prompts, prompts, max_tokens=TOKENS, env=env, serve=serve, **PRESSED)
    assert served["tokens"] == [expected] * 2
    assert served["metrics"]["vllm:num_preemptions"] > 0
    assert served["metrics"]["vllm:prefix_cache_hits"] > 0
    assert "start-up canary passed in 3 layers" in served["log"]
    assert served["calls"].keys() == set(CALLS)
    # Every layer of every step stores once; steps with prompts attend more than once or in torch.
    assert served["calls"]["attend_latents"] > 3 * TOKENS
