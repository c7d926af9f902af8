"""What nvcc makes of the CUDA kernels for MLA latents: registers, spills, instructions of the main loops."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.ops.test_cuda_compiled import ARCHITECTURES, Compiled, Kernel, compile_source, compiler, main_loops


class Budget(NamedTuple):
    """Of a kernel, and of its loop over tiles."""

    registers: int
    instructions: int
    products: int | None
    """9 steps of channels and 8 of output channels, for each 16 rows; None where the steps are a loop of their own."""


BUDGETS = {
    # Rows and tokens of a tile; whether for more channels than the narrow kernel takes. One block of 256 threads has a
    # multiprocessor to itself with 32 rows; two with 16 rows, and 128 registers.
    (32, 32, 0): Budget(224, 600, 2 * (9 * 2 + 8 * 2)),
    (16, 32, 0): Budget(128, 530, 9 * 2 + 8 * 2),
    (16, 16, 1): Budget(128, 470, None),
}


def instance(name: str) -> tuple[int, int, int]:
    found = re.search(r"latent_attendILb[01]ELi(\d+)ELi(\d+)ELb([01])E", name)
    assert found, name
    return int(found[1]), int(found[2]), int(found[3])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    nvcc = compiler()
    if nvcc is None:
        pytest.skip("no nvcc, so the CUDA kernels are not compiled here (the emulation still runs them)")
    return compile_source(nvcc, "latent/api", tmp_path_factory.mktemp("cuda"))


def test_registers_and_spills(compiled: Compiled) -> None:
    attention: list[Kernel] = []
    for kernel in compiled.kernels:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        if "latent_attend" in kernel.name:
            attention.append(kernel)
            assert kernel.registers <= BUDGETS[instance(kernel.name)].registers, kernel
    # Both types of numbers, both architectures.
    assert len(attention) == 4 * len(BUDGETS)


def test_main_loops(compiled: Compiled) -> None:
    """Every product once, tiles read as matrices, no local memory, no division, and the copies the architecture has."""
    loops = main_loops(compiled.objects, "latent_attend")
    assert {architecture for architecture, _ in loops} == set(ARCHITECTURES)
    for (architecture, name), loop in loops.items():
        budget = BUDGETS[instance(name)]
        assert loop["HMMA"] > 0, (name, loop)
        assert budget.products in (None, loop["HMMA"]), (name, loop)
        assert loop["LDSM"], (name, loop)
        for slow in ("I2F", "I2FP", "LDL", "STL"):
            assert not loop[slow], (name, slow, loop)
        assert bool(loop["LDGSTS"]) == (architecture == "sm_80"), (name, loop)
        assert bool(loop["UBLKCP"]) == (architecture == "sm_90"), (name, loop)
        assert loop.total() <= budget.instructions, (name, loop.total(), loop)
