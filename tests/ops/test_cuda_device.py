"""The CUDA kernels on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import check
from kvcompress.ops import cuda_library


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU (the emulation runs the kernels' source instead)")
def test_kernels_compute_what_the_torch_code_computes() -> None:
    if cuda_library.load() is None:
        pytest.skip("no compiled CUDA kernels; make gpu builds them")
    assert check.failures() == {}
