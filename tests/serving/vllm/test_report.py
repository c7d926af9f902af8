from __future__ import annotations

from kvcompress.serving.vllm.report import (
    KERNELS,
    KERNELS_ALONE,
    TORCH,
    LayerReport,
    describe,
    describe_attention,
    describe_capacity,
)


def test_sizes_and_reasons_are_given_for_runs_of_layers() -> None:
    layers = {index: LayerReport(100, 400) for index in (0, 1, 2, 4)}
    layers[3] = LayerReport(400, 400, "sliding window of 128")
    layers[5] = LayerReport(50, 400)
    assert describe(layers, "bfloat16") == (
        "KV cache 850 bytes per token, 2.82x smaller than 2400 in bfloat16; "
        "bytes per token and layer: 0-2: 100, 3: 400, 4: 100, 5: 50; uncompressed layers: 3: sliding window of 128"
    )


def test_nothing_is_said_about_uncompressed_layers_when_there_are_none() -> None:
    assert "uncompressed" not in describe({0: LayerReport(64, 128)}, "float16")


def test_what_each_running_request_takes_besides_is_said() -> None:
    layers = {index: LayerReport(100, 400, request_bytes=1000) for index in (0, 1)}
    assert "; newest tokens uncompressed: 2000 bytes per running request" in describe(layers, "float16")


def test_capacity_is_set_against_that_without_a_codec() -> None:
    layers = {0: LayerReport(100, 400), 1: LayerReport(400, 400)}
    assert describe_capacity(layers, 8000) == "room for 8,000 tokens; without compression for 5,000"


def test_layers_that_torch_code_attends_on_a_gpu_are_named() -> None:
    assert describe_attention({0: KERNELS, 1: KERNELS}) == "attention by layer: 0-1: CUDA kernels"
    assert describe_attention({0: KERNELS, 1: KERNELS_ALONE, 3: TORCH, 4: TORCH}) == (
        "attention by layer: 0: CUDA kernels, 1: CUDA kernels outside of full graphs, 3-4: torch code (slower)"
    )
