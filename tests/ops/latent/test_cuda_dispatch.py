"""Operations on MLA latents bound to a GPU, the emulation in its place."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases.heads import relative_error
from benchmarks.cases.latent import Cache, bar
from kvcompress.ops.call import Call
from kvcompress.ops.latent.cuda import CudaLatent
from kvcompress.ops.latent.graph import latent_append, latent_attend
from tests.ops import emulated

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors on the CPU count as a GPU's; which operations the kernels do."""
    emulated.count_as_gpu(monkeypatch)
    found_calls: list[str] = []
    for name in ("attend", "append"):
        function = getattr(CudaLatent, name)
        monkeypatch.setattr(CudaLatent, name, lambda *args, f=function, n=name: (found_calls.append(n), f(*args)))
    return found_calls


@pytest.mark.parametrize("as_tensors", [False, True])
def test_attention(calls: list[str], as_tensors: bool) -> None:
    cache = Cache([100, 70], 64, torch.bfloat16)
    query_THC = cache.query(4, 3, torch.bfloat16)
    found_THR = torch.full((4, 3, 40), torch.nan, dtype=torch.bfloat16)
    numbers: list[list[int]] = [[0, 1, 4], cache.seq_lens]
    batch = [torch.tensor(rows) for rows in numbers] if as_tensors else numbers
    cache.op.attend(Call(found_THR, query_THC, cache.block_table_RN.long(), *batch, 0.1), cache.pages_NSC)
    assert relative_error(found_THR, cache.exact(query_THC, [1, 3], 40)) < bar(torch.bfloat16)
    assert calls == ["attend"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whom_a_gpu_has_attend(calls: list[str], dtype: torch.dtype) -> None:
    assert type(Cache([3], 64, dtype).op) is CudaLatent
    for channels, other in ((64, torch.float32), (56, dtype), (2288, dtype)):
        assert not isinstance(Cache([3], channels, other).op, CudaLatent)


def test_what_has_no_kernel_goes_elsewhere(calls: list[str]) -> None:
    cache = Cache([100, 70], 64, torch.float32)
    query_THC = cache.query(4, 3)
    assert relative_error(cache.attend(query_THC, [1, 3], 40), cache.exact(query_THC, [1, 3], 40)) < 1e-5
    cache.op.append(cache.pages_NSC, cache.keys[0][:1].half(), torch.tensor([3]))
    assert torch.equal(cache.pages_NSC.reshape(-1, 64)[3], cache.keys[0][0].half().float())
    assert calls == []


def test_append(calls: list[str]) -> None:
    cache = Cache([40], 64, torch.float16)
    cache.op.append(cache.pages_NSC, cache.keys[0][:2], torch.tensor([-1, 35]))
    assert torch.equal(cache.pages_NSC.reshape(-1, 64)[35], cache.keys[0][1])
    assert calls == ["append"]


def test_opcheck(calls: list[str]) -> None:
    cache = Cache([40, 17], 32, torch.bfloat16)
    query_THC = cache.query(3, 4, torch.bfloat16)
    numbers = (torch.tensor(rows, dtype=torch.int32) for rows in ([0, 1, 3], [40, 17]))
    pages_NSC = cache.pages_NSC.contiguous()
    arguments = (query_THC, pages_NSC, cache.block_table_RN, *numbers, 16, 0.1, 2)
    torch.library.opcheck(latent_attend, arguments, test_utils=CHECKS)
    assert relative_error(latent_attend(*arguments), cache.exact(query_THC, [1, 2], 16)) < bar(torch.bfloat16)
    finite_NSC = pages_NSC.nan_to_num()
    torch.library.opcheck(
        latent_append, (finite_NSC, query_THC[:, 0], torch.tensor([3, -1, 20]), 16), test_utils=CHECKS
    )
    assert set(calls) == {"attend", "append"}
