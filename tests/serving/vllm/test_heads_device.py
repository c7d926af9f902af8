"""Form `heads` on the CUDA kernels, emulated: pages in fragment order, numbers on the device, graphs."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import require

require.need("vllm")


from benchmarks.cases.heads import bands, random_codec, relative_error
from benchmarks.cases.heads_sides import bar
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import gpu
from kvcompress.ops.call import Call
from kvcompress.ops.heads import cuda, prefill
from kvcompress.serving.vllm import canary, compat, heads
from kvcompress.serving.vllm import sentinel as sentinels
from kvcompress.serving.vllm.heads import DeviceHeadsBackend, DeviceHeadsImpl, HeadsBackend
from kvcompress.serving.vllm.metadata import DeviceBuilder
from kvcompress.serving.vllm.metrics import Numbers
from kvcompress.serving.vllm.sentinel import Sentinel
from kvcompress.serving.vllm.served import Served
from tests.ops import emulated
from tests.serving.vllm import canary_layers, engines
from tests.serving.vllm.device_engine import BLOCK, HEADS, KV_HEADS, MOST_TOKENS, POISON, DeviceEngine
from tests.serving.vllm.no_waits import NoWaits

K_SIDE, V_SIDE = bands((8, 16), (4, 16)), bands((4, 24), outliers=1)
HEAD_DIM = 32
# Whole prompts and chunks of them, of more and of fewer queries than the kernels take, beside decoding requests.
STEPS = [{0: 7, 1: 1}, {0: 80}, {0: 1, 2: 70, 1: 1, 3: 66, 4: 2}, {4: 64, 0: 1}, {2: 1, 3: 1, 4: 1}, {1: 1, 4: 1}]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    return emulated.count_as_gpu(monkeypatch)


@pytest.fixture
def plain_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own kind of mask cannot be made while its operations are watched."""
    monkeypatch.setattr(prefill, "causal_lower_right", lambda q, t: torch.ones(q, t, dtype=torch.bool).tril(t - q))


def engine(dtype: torch.dtype = torch.float32) -> DeviceEngine:
    return DeviceEngine(random_codec(KV_HEADS, HEAD_DIM, K_SIDE, V_SIDE), dtype)


class TestChoice:
    """Where a layer's attention runs, and with it the order of bytes in its pages."""

    @staticmethod
    def chosen(k: SideSpec = K_SIDE, v: SideSpec = V_SIDE, block_size: int | None = None) -> Any:
        chosen = {"block_size": block_size or 16, "block_size_chosen": block_size is not None}
        serving = engines.engine(device=torch.device("cuda"), **chosen)
        return heads.backend_for(HeadsSpec(KV_HEADS, 256, k, v), serving)

    @pytest.mark.usefixtures("kernels")
    @pytest.mark.parametrize("block_size", [None, 64, 128, 512])
    def test_kernels_wherever_they_cover_the_layer(self, block_size: int | None) -> None:
        assert self.chosen(block_size=block_size) is DeviceHeadsBackend
        assert DeviceHeadsBackend.get_preferred_block_size(16) == BLOCK

    @pytest.mark.usefixtures("kernels")
    def test_torch_code_for_what_they_do_not_cover(self) -> None:
        floats = bands((32, 32))
        assert self.chosen(k=floats, block_size=48) is HeadsBackend
        assert self.chosen(v=floats) is HeadsBackend

    @pytest.mark.usefixtures("kernels")
    def test_torch_code_for_what_a_gpu_has_no_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wide = bands((16, 256))
        assert self.chosen(k=wide, v=wide) is DeviceHeadsBackend
        cuda.fits.cache_clear()
        monkeypatch.setenv("KVC_EMULATED_SHARED_BYTES", str(163 * 1024))
        assert self.chosen(k=wide, v=wide) is HeadsBackend
        cuda.fits.cache_clear()

    def test_torch_code_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "kernels", lambda device: None)
        assert self.chosen(block_size=48) is HeadsBackend

    @pytest.mark.usefixtures("kernels")
    @pytest.mark.parametrize("block_size", [16, 48, 96, 192])
    def test_block_sizes_that_the_kernels_cannot_read_are_refused(self, block_size: int) -> None:
        with pytest.raises(
            ValueError, match=rf"found --block-size {block_size}; .* use 64, .*KVCOMPRESS_CUDA_LIBRARY="
        ):
            self.chosen(block_size=block_size)

    @pytest.mark.usefixtures("kernels")
    def test_so_are_pages_that_the_engine_has_made_of_such_a_size(self) -> None:
        running = engine()
        running.cache = torch.zeros(2, KV_HEADS, 192, running.cache.shape[3], dtype=torch.uint8)
        with pytest.raises(ValueError, match="found --block-size 192"):
            running.step({0: 1})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, bar(K_SIDE)), (torch.bfloat16, 1.5e-2)])
@pytest.mark.usefixtures("kernels", "plain_mask")
def test_mixed_batches_without_waiting_for_the_device(dtype: torch.dtype, tolerance: float) -> None:
    running = engine(dtype)
    for number, new_tokens in enumerate(STEPS):
        # Padding is described as in a full graph, is there and not described as in a piecewise one, or is not there.
        padding, described = 3 * (number % 2), number % 3 > 0
        tokens = sum(new_tokens.values()) + padding
        batch = running.prepare(new_tokens, len(new_tokens) + bool(padding and described), tokens)
        if not described:
            batch.num_actual_tokens = tokens - padding
            batch.slot_mapping = batch.slot_mapping[: tokens - padding]
        with NoWaits(*running.host):
            running.run(running.builder.build(0, batch), tokens)
        start = 0
        found, expected = running.outputs(new_tokens)
        for count in new_tokens.values():
            rows = slice(start, start + count)
            assert relative_error(found[rows], expected[rows]) < tolerance
            start += count
    assert bool((running.other == POISON).all()), "another layer's bytes were touched"
    assert bool((running.cache[0] == POISON).all()), "padding was stored"


@pytest.mark.usefixtures("kernels")
def test_parts_of_a_batch() -> None:
    running = engine()
    batch = running.prepare({0: 1, 1: 64, 2: 65, 3: 70, 4: 2})
    parts = running.builder.describe(compat.Batch.of(batch)).parts
    assert [(part.requests, part.tokens, part.max_query_len) for part in parts] == [
        (slice(0, 2), slice(0, 65), 64),
        (slice(2, 3), slice(65, 130), 65),
        (slice(3, 4), slice(130, 200), 70),
        (slice(4, 5), slice(200, 202), 2),
    ]
    assert [list(part.query_starts) for part in parts] == [[0, 1, 65], [0, 65], [0, 70], [0, 2]]
    assert [list(part.seq_lens) for part in parts] == [[1, 64], [65], [70], [2]]
    batch.seq_lens_cpu_upper_bound = None  # then a prompt costs one wait
    parts = running.builder.describe(compat.Batch.of(batch)).parts
    assert [list(part.seq_lens) for part in parts] == [[1, 64], [65], [70], [2]]
    batch = running.prepare({0: 1, 1: 3}, 4, 6)
    [part] = running.builder.describe(compat.Batch.of(batch)).parts
    assert part.seq_lens.data_ptr() == running.lengths.data_ptr()
    assert part.query_starts.data_ptr() == running.starts.data_ptr()


@pytest.mark.parametrize("queries", [1, 3])
def test_a_captured_step_is_right_for_other_batches(
    queries: int, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph repeats launches with the arguments they were captured with: these must not depend on what is in tensors.

    Captured as vLLM does, with a made-up batch; replayed with requests of any length, and with padding.
    """
    launched: list[tuple[Any, ...]] = []
    attend_latents = cuda.CudaHeads.attend_latents

    def watched(op: Any, call: Call, absorbed_THR: Tensor, pages_NHX: Tensor, *splits: Any) -> Any:
        numbers = (pages_NHX, call.block_table_RN, call.query_starts, call.seq_lens)
        places = [each.data_ptr() for each in numbers if isinstance(each, Tensor)]
        launched.append((absorbed_THR.shape, *places, call.softmax_scale, call.max_query_len, *splits))
        return attend_latents(op, call, absorbed_THR, pages_NHX, *splits)

    monkeypatch.setattr(cuda.CudaHeads, "attend_latents", watched)
    running = engine()
    running.step({0: 60, 1: 100, 2: 5})
    launched.clear()
    dummy = {3: queries, 4: queries, 1: queries, 2: queries}
    history, tokens = dict(running.history), 4 * queries
    captured = running.prepare(dummy, tokens=tokens)
    running.slots.fill_(-1)
    running.table.zero_()
    metadata = running.builder.build_for_cudagraph_capture(captured)
    running.run(metadata, tokens)
    running.history = history
    for replayed in ({1: queries, 0: queries, 2: queries}, {0: queries}, dict.fromkeys((2, 1, 0, 3), queries)):
        running.prepare(replayed, 4, tokens)
        running.run(metadata, tokens)
        found, expected = running.outputs(replayed)
        assert relative_error(found, expected) < bar(K_SIDE)
        assert bool(running.output[: len(found)].isfinite().all())
    assert len(launched) == 4
    assert set(launched) == {launched[0]}


def test_graphs_are_declared_for_what_the_kernels_take() -> None:
    def declared(builder: Any, drafts: int) -> str:
        found: str = builder.get_cudagraph_support(SimpleNamespace(num_speculative_tokens=drafts), None).name
        return found

    assert {declared(DeviceBuilder, drafts) for drafts in (0, 3, 31)} == {"UNIFORM_BATCH"}
    assert declared(DeviceBuilder, 32) == "UNIFORM_SINGLE_TOKEN_DECODE"
    assert declared(HeadsBackend.get_builder_cls(), 0) == "NEVER"


def sentinel_of(running: DeviceEngine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Give the engine a sentinel that acts at every step; what it counts: whether each page was damaged."""
    counted: list[bool] = []
    monkeypatch.setattr(Numbers, "count", lambda self, failed: counted.append(failed))
    layer = replace(engines.layer(HEADS, KV_HEADS, HEAD_DIM, cache=running.cache), name="layer")
    layer.module.impl = running.impl
    sentinel = Sentinel([Served(0, layer, running.codec)], Numbers("0-0", 0, 100, 400, 1000), lambda: 0.0)
    running.builder.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(sentinel=sentinel))
    return counted


def decode(running: DeviceEngine, steps: int, bounds: bool = True) -> None:
    """Steps as far as the sentinel is concerned."""
    with NoWaits(*running.host):
        for _ in range(steps):
            batch = running.prepare({0: 1, 1: 1})
            if not bounds:
                batch.seq_lens_cpu_upper_bound = None
            running.builder.build(0, batch)


@pytest.mark.usefixtures("kernels")
def test_the_sentinel_sees_damage_and_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine()
    running.step({0: 2 * BLOCK, 1: 10})
    counted = sentinel_of(running, monkeypatch)
    decode(running, 8)
    assert counted == [False] * 3
    running.cache[running.tables[0, :2].long()] = POISON
    for _ in range(4):
        running.builder.build(0, running.prepare({0: 1}))
    assert counted[-1]


@pytest.mark.usefixtures("kernels")
def test_the_sentinel_comes_back_for_a_verdict_that_has_not_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine()
    running.step({0: 2 * BLOCK, 1: 10})
    counted = sentinel_of(running, monkeypatch)
    arrived = False
    monkeypatch.setattr(sentinels._Verdict, "arrived", lambda self: arrived)
    decode(running, 6)
    assert not counted
    arrived = True
    running.builder.build(0, running.prepare({0: 1}))
    assert counted == [False]


@pytest.mark.usefixtures("kernels")
def test_the_sentinel_picks_nothing_where_the_engine_tells_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine()
    running.step({0: 2 * BLOCK, 1: 10})
    counted = sentinel_of(running, monkeypatch)
    decode(running, 6, bounds=False)
    assert not counted


@pytest.mark.usefixtures("kernels")
def test_batches_made_up_for_graphs_are_nothing_to_the_sentinel() -> None:
    running = engine()
    asked = SimpleNamespace(step=lambda names, step: pytest.fail("asked"))
    running.builder.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(sentinel=asked))
    running.builder.build_for_cudagraph_capture(running.prepare({0: 1}))


def watched_by_the_canary() -> tuple[Served, canary.Inputs]:
    """A layer of `canary_layers` with this form's implementation and pages."""
    [served], [given] = canary_layers.make("heads")
    codec: Any = served.codec
    served.layer.module.impl = DeviceHeadsImpl(
        served.layer.num_heads, served.layer.head_size, served.layer.scale, served.layer.num_kv_heads
    )
    served.layer.impl.use_codec(codec, torch.device("cpu"), 512)
    served.layer.module.kv_cache = canary_layers.pages(served.layer, 10, BLOCK, POISON)[:, 0]
    return served, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_the_canary_passes_and_leaves_the_cache_as_it_was(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    canary_layers.without_an_engine(monkeypatch)
    served, given = watched_by_the_canary()
    canary.check_paths(None, [served], [canary.Inputs(*(x_THD.to(dtype) for x_THD in given))])
    assert bool((served.layer.cache == POISON).all())


@pytest.mark.parametrize(
    ("kernel", "path"), [("attend_latents", "decode"), ("read", "prefill"), ("_append", "prefill")]
)
@pytest.mark.usefixtures("kernels")
def test_the_canary_names_the_path_of_a_wrong_kernel(kernel: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canary_layers.without_an_engine(monkeypatch)
    served, given = watched_by_the_canary()
    right = getattr(cuda.CudaHeads, kernel)

    def wrong(*arguments: Any, **options: Any) -> Any:
        if kernel == "_append":
            *rows, slots_T = arguments
            return right(*rows, torch.where(slots_T % BLOCK == 9, slots_T - 1, slots_T), **options)
        first, second = right(*arguments, **options)
        return (first, 1.05 * second) if kernel == "read" else (1.1 * first, second)

    monkeypatch.setattr(cuda.CudaHeads, kernel, wrong)
    with pytest.raises(ValueError, match=rf"layer 0 .*, {path}: attention from compressed pages differs by"):
        canary.check_paths(None, [served], [given])


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations make, as many as are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage(), args)
        return result

    def _note(self, storage: Any, args: Any) -> None:
        key = storage._cdata
        old = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        if key in self._known or key in old:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.usefixtures("kernels")
def test_the_profiling_run_reserves_what_attention_takes(
    prompt: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU, torch's fused attention takes none for a mask.
    monkeypatch.setattr(prefill, "causal_lower_right", lambda queries, tokens: None)
    running = engine(dtype)
    batch = running.prepare({0: MOST_TOKENS} if prompt else dict.fromkeys(range(5), MOST_TOKENS // 5))
    metadata = running.builder.build(0, batch)
    with Memory() as memory:
        running.run(metadata, MOST_TOKENS)
    assert memory.most <= running.impl.workspace_bytes(running.output)
    spec = running.codec.spec
    if not prompt:
        ranks = (spec.head_dim, spec.k.rank, spec.v.rank)
        reserved = gpu.workspace_bytes(*ranks, MOST_TOKENS, HEADS, torch.device("cpu"))
    elif dtype == torch.float32:
        return
    else:
        reserved = prefill.workspace_bytes(spec, MOST_TOKENS, HEADS, MOST_TOKENS, dtype)
    assert reserved / 2 < memory.most <= reserved
