"""The CUDA kernels of layers that share a latent: their own source, run on the CPU, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from benchmarks.cases.heads import POISON, bands, relative_error
from benchmarks.cases.shared import CUDA_SIDES, HALVES_BAR, Group, a_group
from kvcompress.codec.bands import SideSpec
from kvcompress.ops import gpu, library
from kvcompress.ops.shared import cuda as cuda_shared
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.cpu import CpuShared
from kvcompress.ops.shared.cuda import CudaShared
from kvcompress.ops.shared.reference import SharedOp
from tests.ops import emulated


@pytest.fixture
def kernels() -> ctypes.CDLL:
    """They copy by lanes on every GPU, so one emulation is all there is to run."""
    found = emulated.library("sm_90")
    if found is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    return found


def attend(kernels: ctypes.CDLL, group: Group, splits: tuple[int, int] = (1, 1), **options: int) -> Tensor:
    assert cuda_shared.covers(group.codec)
    call = group.call(max(group.query_lens))
    CudaShared(kernels, group.codec).attend_few(call, splits, **options)
    return call.output_THD


LENGTHS, QUERIES = [1, 17, 64, 131, 300, 90, 40], [1, 1, 1, 3, 1, 0, 9]


def assert_exact(kernels: ctypes.CDLL, group: Group, splits: tuple[int, int] = (1, 1), **options: int) -> Tensor:
    found_THD = attend(kernels, group, splits, **options)
    assert relative_error(found_THD, group.exact()) < HALVES_BAR
    return found_THD


@pytest.mark.parametrize("share", ["kv", "v"])
@pytest.mark.parametrize(("k", "v"), CUDA_SIDES)
def test_every_width(kernels: ctypes.CDLL, k: SideSpec, v: SideSpec, share: str) -> None:
    """Ragged lengths, NaN in everything that was never written, table entries of -1, no or several query tokens."""
    assert_exact(kernels, a_group(k, v, LENGTHS, QUERIES, share))


@pytest.mark.parametrize("share", ["kv", "v"])
@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "query_heads"), [(1, 1, 16, 1), (3, 2, 128, 14), (2, 1, 40, 40), (2, 2, 256, 4)]
)
def test_shapes(kernels: ctypes.CDLL, layers: int, heads: int, head_dim: int, query_heads: int, share: str) -> None:
    """Among them several blocks of rows, for scores and for values."""
    k, v = bands((8, 16)), bands((4, 16))
    assert_exact(kernels, a_group(k, v, [90, 33], [1, 4], share, layers, heads, head_dim, query_heads, place=0))


@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "k", "v", "shared_bytes"),
    [
        (2, 5, 64, bands((8, 72)), bands((4, 264)), 227 * 1024),  # decoders in slices; several blocks of channels
        (2, 4, 64, bands((8, 200)), bands((8, 200)), 99 * 1024),  # two slices at a time
        (1, 4, 256, bands((8, 400)), bands((8, 800)), 99 * 1024),  # fewer warps; one place for codes of values
    ],
)
def test_latents_of_many_channels(
    kernels: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    heads: int,
    head_dim: int,
    k: SideSpec,
    v: SideSpec,
    shared_bytes: int,
) -> None:
    monkeypatch.setenv("KVC_EMULATED_SHARED_BYTES", str(shared_bytes))
    group = a_group(k, v, [280, 65], [1, 2], "kv", layers, heads, head_dim, heads, place=0)
    found_THD = assert_exact(kernels, group)
    monkeypatch.setenv("KVC_EMULATED_EARLY_COPIES", "1")
    assert torch.equal(attend(kernels, group), found_THD)


def test_copies_that_come_early_overwrite_nothing(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they come when they are waited for, and not before."""
    for share in ("kv", "v"):
        group = a_group(bands((8, 72)), bands((8, 40)), [600], [1], share, 2, 1, 80, 2, place=0)
        monkeypatch.delenv("KVC_EMULATED_EARLY_COPIES", raising=False)
        expected_THD = attend(kernels, group)
        monkeypatch.setenv("KVC_EMULATED_EARLY_COPIES", "1")
        assert torch.equal(attend(kernels, group), expected_THD)


@pytest.mark.parametrize("share", ["kv", "v"])
def test_splits_agree(kernels: ctypes.CDLL, share: str) -> None:
    """Also with more splits than there are tokens for, and some requests at a time."""
    group = a_group(bands((8, 24)), bands((4, 40)), [700, 64, 1], [2, 1, 1], share)
    whole_THD = assert_exact(kernels, group)
    for splits, score_bytes in [((2, 3), 1), ((5, 16), 2 * 2 * 8 * 768 * 4)]:
        split_THD = assert_exact(kernels, group, splits, score_bytes=score_bytes)
        assert relative_error(split_THD, whole_THD.double()) < 2e-4


@pytest.mark.parametrize("share", ["kv", "v"])
@pytest.mark.parametrize("stored_after_all", [False, True])
def test_rows_of_another_request_of_the_step(kernels: ctypes.CDLL, stored_after_all: bool, share: str) -> None:
    group = a_group(bands((16, 24)), bands((16, 40)), [100, 200], [30, 1], share)
    group.stored_lens[1] = 32
    # The second request's tokens from 32 on are rows of the first, or as they are stored, then its own.
    rows = torch.full((167,), -1) if stored_after_all else torch.arange(167) % 30
    group.exact_rows = torch.cat([torch.arange(30), rows, torch.tensor([30])])
    for seen, step_THD in zip(group.decoded[1], (group.keys_THD, group.values_THD), strict=True):
        if not stored_after_all and (share == "kv" or step_THD is group.values_THD):
            seen[32:199] = step_THD[rows].double()
    # Row -1 is nobody's.
    for name in ("keys_THD", "values_THD"):
        step_THD = getattr(group, name)
        setattr(group, name, torch.cat([torch.full_like(step_THD[:1], torch.nan), step_THD])[1:])
    assert_exact(kernels, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", ["kv", "v"])
def test_sixteen_bit_steps(kernels: ctypes.CDLL, dtype: torch.dtype, share: str) -> None:
    group = a_group(bands((8, 24)), bands((8, 40)), [100, 40], [1, 3], share, dtype=dtype)
    assert relative_error(attend(kernels, group), group.exact()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1, 1024])
def test_keys_turn_by_the_models_angles(kernels: ctypes.CDLL, scale: float) -> None:
    """Up to a million radians, as in the longest contexts: float32 angles are a good part of a turn's hundredth off."""
    group = a_group(
        bands((16, 16)), bands((16, 16)), [1001], [1], layers=1, heads=1, query_heads=2, place=0, turn=scale
    )
    assert_exact(kernels, group)


@pytest.mark.parametrize("case", ["zeros", "huge latents", "tiny and huge queries", "dominant token"])
@pytest.mark.parametrize("bits", [16, 8])
def test_adversarial_values(kernels: ctypes.CDLL, bits: int, case: str) -> None:
    size = 3e4 if case == "huge latents" else 1.0
    group = a_group(bands((bits, 24)), bands((bits, 40)), [150], [3], size=size)
    if case == "zeros":
        group.query_THD[1] = 0
    elif case == "huge latents":
        group.query_THD /= 1e5
    elif case == "tiny and huge queries":
        group.query_THD[0] *= 1e-20
        group.query_THD[1] *= 30
    else:
        group.query_THD[2, :4] = 3 * group.decoded[0][0][77, 0].float()
    # A score of some hundreds carries the rounding of halves into the exponent.
    bar = 20 * HALVES_BAR if case in ("tiny and huge queries", "dominant token") else HALVES_BAR
    assert relative_error(attend(kernels, group), group.exact()) < bar


@pytest.mark.parametrize("share", ["kv", "v"])
def test_a_query_that_is_not_finite_stays_visible(kernels: ctypes.CDLL, share: str) -> None:
    group = a_group(bands((8, 24)), bands((8, 40)), [70], [2], share)
    group.query_THD[0, 1, 5] = torch.nan
    found_THD = attend(kernels, group, (1, 2))
    assert found_THD[0, 1].isnan().all()
    assert found_THD[0, 0].isfinite().all()
    assert found_THD[1].isfinite().all()


@pytest.mark.parametrize(
    "spec",
    [
        bands((8, 40)),
        bands((4, 24)),
        bands((2, 24)),
        bands((8, 8), (4, 8), (2, 8)),
        bands((16, 24)),
        bands((8, 96), (4, 168)),
        bands((4, 520)),
    ],
)
def test_records_are_those_of_torch(kernels: ctypes.CDLL, spec: SideSpec) -> None:
    generator = torch.Generator().manual_seed(3)
    latent_THR = 1.5 * torch.randn(50, 3, spec.rank, generator=generator)
    latent_THR[9, 0, 3], latent_THR[9, 1, 5], latent_THR[10, 2] = torch.nan, -torch.inf, 0
    weight_HR = torch.linspace(2, 0.3, spec.rank).expand(3, -1)
    slots_T = torch.randperm(96, generator=generator)[:50]
    slots_T[7] = -1
    written, expected = torch.full((2, 6, 3, 16, spec.bytes_per_token), POISON, dtype=torch.uint8)
    codec = a_group(*CUDA_SIDES[0], [20], [1]).codec
    SharedOp(codec).store(expected, spec, latent_THR, weight_HR, slots_T)
    slots_T[7] = 96  # outside the cache
    CudaShared(kernels, codec).store(written, spec, latent_THR, weight_HR, slots_T)
    # Sums in another order move a gain across a rounding boundary now and then.
    assert float((written != expected).float().mean()) < (5e-3 if spec.has_gain else 1e-9)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors on the CPU count as a GPU's; the calls that the kernels got."""
    emulated.count_as_gpu(monkeypatch)
    calls: list[str] = []
    for name in ("attend_few", "store"):
        function = getattr(CudaShared, name)
        monkeypatch.setattr(CudaShared, name, lambda *args, f=function, n=name: (calls.append(n), f(*args)))
    return calls


@pytest.mark.parametrize("share", ["kv", "v"])
def test_attention_on_a_gpu(on_device: list[str], monkeypatch: pytest.MonkeyPatch, share: str) -> None:
    """Requests of many queries are a prefill and go to torch, where the host knows which they are."""
    seen = []
    attend = SharedOp.attend

    def spy(op: SharedOp, call: SharedCall) -> None:
        seen.append(call.seq_lens.tolist())
        attend(op, call)

    monkeypatch.setattr(SharedOp, "attend", spy)
    many = gpu.MOST_QUERIES + 1
    group = a_group(*CUDA_SIDES[3], [100, 40, many + 9, 30], [1, 3, many, 2], share)
    assert relative_error(group.attend(), group.exact()) < HALVES_BAR
    assert (on_device, seen) == (["attend_few"] * 2, [[many + 9]])
    group = a_group(*CUDA_SIDES[3], [100, 40], [1, 3], share)
    assert relative_error(group.attend(max_query_len=3), group.exact()) < HALVES_BAR
    assert (len(on_device), len(seen)) == (3, 1)


def test_storing_on_a_gpu(on_device: list[str]) -> None:
    records, op = torch.zeros(2, 1, 16, 10, dtype=torch.uint8), bind(a_group(*CUDA_SIDES[0], [20], [1]).codec, "cpu")
    op.store(records, bands((8, 8)), torch.ones(1, 1, 8), torch.ones(1, 8), torch.tensor([17]))
    assert on_device == ["store"]
    assert bool(records[1, 0, 1].all())


def test_whom_a_gpu_has_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, but none of floats of 32 bits, wide records or wide heads."""
    codec = a_group(*CUDA_SIDES[0], [20], [1]).codec
    assert not isinstance(bind(codec, "cpu"), CudaShared)
    emulated.count_as_gpu(monkeypatch)
    monkeypatch.setattr(library, "load", lambda: None)
    assert type(bind(codec, "cpu")) is CudaShared
    k, v = CUDA_SIDES[0]
    for other_k, other_v, heads, head_dim in (
        (bands((32, 8)), bands((32, 16)), 2, 32),
        (k, bands((8, 1032)), 9, 128),
        (k, bands((8, 24), outliers=1), 2, 32),
        (k, v, 2, 320),
    ):
        other = a_group(other_k, other_v, [20], [1], heads=heads, head_dim=head_dim, query_heads=heads).codec
        assert not cuda_shared.covers(other)
        assert type(bind(other, "cpu")) is SharedOp
    monkeypatch.undo()
    assert type(bind(codec, "cpu")) is (SharedOp if library.load() is None else CpuShared)


def test_records_that_are_not_aligned_are_refused(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, and by the kernels themselves."""
    records = torch.zeros(200, dtype=torch.uint8)[8:168].view(1, 1, 16, 10)
    stored = (records, bands((8, 8)), torch.ones(1, 1, 8), torch.ones(1, 8), torch.tensor([0]))
    op = CudaShared(kernels, a_group(*CUDA_SIDES[0], [20], [1]).codec)
    with pytest.raises(AssertionError):
        op.store(*stored)
    monkeypatch.setattr(cuda_shared, "_aligned", lambda records_NHSX: True)
    with pytest.raises(ValueError, match="shape"):
        op.store(*stored)
