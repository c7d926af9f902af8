"""What nvcc makes of the CUDA kernels, on a machine without a GPU: registers, spills, instructions of the main loops.

All sources are compiled for both architectures with the release build's flags.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS, WIDE_REGISTERS, LONG_REGISTERS = 168, 192, 224
"""Three blocks of four warps then fit on a multiprocessor, as its shared memory lets in two or three; with 8 or 16 bits
on both sides it lets in one. Of 256 channels, it lets in two with 2 bits and one with more."""

SOURCES = sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "csrc" / "cuda").glob("*/*.cu"))
SOURCES.remove("latent/api")  # tests/ops/latent has its own
INSTANCES = [source for source in SOURCES if source.startswith("heads/decode_")]
"""One for every pair of widths, and one for bands of any."""

MOST_REGISTERS = {
    "shared/api": 240,
    "shared/encode": 255,
    "heads/decode_16_16": WIDE_REGISTERS,
    "heads/decode_8_8": WIDE_REGISTERS,
}
"""Keys that layers share fill a multiprocessor with one block of eight warps, wide latents with two of four."""

LOOP = {
    "heads/decode_4_4": {"sm_80": 1000, "sm_90": 910},
    "heads/decode_2_2": {"sm_80": 980, "sm_90": 890},
}
"""Instructions in a warp's loop over 64 tokens of 128 channels, keys and values, all query heads of a group. About 70
of them run at a request's end only; on sm_80 the copies take about 60."""


BLOCK_LOOP = {"sm_80": 2100, "sm_90": 2050}
"""The same of a loop over blocks (form `blocks`) with all that they may have."""


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel."""

    name: str
    architecture: str
    registers: int
    spilled: int
    stack: int


class Compiled(NamedTuple):
    source: str
    objects: Path
    kernels: list[Kernel]


def compiler() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, of the package nvidia-cuda-cuobjdump, or the one triton brings along."""
    places = [Path("/usr/local/cuda/bin")]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        found = importlib.util.find_spec(package)
        places += [Path(place, folder) for place in (found and found.submodule_search_locations) or ()]
    found_ones = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return shutil.which("cuobjdump") or next(filter(None, found_ones), None)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """One source's objects for all architectures, and the compiler's report."""
    nvcc = compiler()
    if nvcc is None:
        pytest.skip("no nvcc, so the CUDA kernels are not compiled here (the emulation still runs them)")
    return compile_source(nvcc, request.param, tmp_path_factory.mktemp("cuda"))


def compile_source(nvcc: str, source: str, directory: Path) -> Compiled:
    target = directory / f"{Path(source).name}.o"
    flags = ["-std=c++17", "-Xptxas", "-v", "-Icsrc", "-Icsrc/include", "-Werror", "all-warnings"]
    for architecture in ARCHITECTURES:
        flags += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    if source.endswith("/encode"):
        flags.append("-fmad=false")
    command = [nvcc, *flags, "-c", f"csrc/cuda/{source}.cu", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(source, target, list(reports(done.stderr)))


def reports(text: str) -> list[Kernel]:
    found = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", text)[1:]:
        entry = re.search(r"entry function '(\S+)' for '(\S+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        assert entry
        assert frame
        assert registers
        spilled = int(frame[2]) + int(frame[3])
        found.append(Kernel(entry[1], entry[2], int(registers[1]), spilled, int(frame[1])))
    return found


@pytest.mark.parametrize("compiled", SOURCES, indirect=True, scope="module")
def test_registers_and_spills(compiled: Compiled) -> None:
    assert {kernel.architecture for kernel in compiled.kernels} == set(ARCHITECTURES)
    most = MOST_REGISTERS.get(compiled.source, REGISTERS)
    for kernel in compiled.kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.stack == 0, kernel
        long = re.search(r"6decodeI.*ELi16ELb", kernel.name)
        assert kernel.registers <= (LONG_REGISTERS if long else most), kernel


@pytest.mark.parametrize("compiled", INSTANCES, indirect=True, scope="module")
def test_main_loops(compiled: Compiled) -> None:
    """Tensor cores, no conversion from whole numbers, no local memory, and the copies the architecture has."""
    loops = main_loops(compiled.objects)
    assert {architecture for architecture, _ in loops} == set(ARCHITECTURES)
    for (architecture, name), loop in loops.items():
        assert loop["HMMA"] >= 16, (name, loop)
        for slow in ("I2F", "I2FP", "LDL", "STL"):
            assert not loop[slow], (name, slow, loop)
        assert bool(loop["LDGSTS"]) == (architecture == "sm_80"), (name, loop)
        assert bool(loop["UBLKCP"]) == (architecture == "sm_90"), (name, loop)


@pytest.mark.parametrize("compiled", LOOP, indirect=True, scope="module")
def test_instructions_per_chunk(compiled: Compiled) -> None:
    """One more instruction per code would make the kernels slower than the memory they save."""
    chosen = {key: loop for key, loop in main_loops(compiled.objects).items() if "ELi8ELb0E" in key[1]}
    assert len(chosen) == len(ARCHITECTURES)
    for key, loop in chosen.items():
        assert loop.total() <= LOOP[compiled.source][key[0]], (key, loop.total(), loop)
        # Keys and values of eight tiles, four each, and one product more per 16 tokens for the offsets.
        assert loop["HMMA"] == 68, (key, loop)


@pytest.mark.parametrize("compiled", ["shared/api"], indirect=True, scope="module")
def test_loops_of_shared_latents(compiled: Compiled) -> None:
    """The innermost loops around tensor cores hold all widths' instructions, of which a tile runs one width's."""
    limits = {
        "score_sharedILi64E": {"sm_80": 280, "sm_90": 240},
        "score_sharedILi128E": {"sm_80": 340, "sm_90": 265},
        "score_sharedILi256E": {"sm_80": 200, "sm_90": 190},
        "mix_shared": {"sm_80": 620, "sm_90": 600},
        "score_own": {"sm_80": 350, "sm_90": 260},
    }
    found = listings(compiled.objects, "score_|mix_")
    assert len(found) == len(ARCHITECTURES) * len(limits)
    for (architecture, name), listing in found.items():
        loop = min((loop for loop in loops_of(listing) if loop["HMMA"] >= 16), key=lambda loop: loop.total())
        most = next(most for part, most in limits.items() if part in name)
        assert loop.total() <= most[architecture], (architecture, name, loop.total(), loop)
        for slow in ("I2F", "I2FP"):
            assert not loop[slow], (name, slow, loop)
        whole = max(loops_of(listing), key=lambda loop: loop.total())
        assert whole["LDGSTS"], (name, whole)
        for slow in ("LDL", "STL"):
            assert not whole[slow], (name, slow, whole)


@pytest.mark.parametrize("compiled", ["blocks/api"], indirect=True, scope="module")
def test_loops_over_blocks(compiled: Compiled) -> None:
    """Loops over columns and outliers lie in it: more are run than counted here, about 3000 with 168 outliers."""
    loops = main_loops(compiled.objects, "decode_blocks")
    assert len(loops) == 4 * len(ARCHITECTURES)
    for (architecture, name), loop in loops.items():
        assert loop.total() <= BLOCK_LOOP[architecture], (name, loop.total(), loop)
        # Keys of a column: 16 of codes, 4 of scales and zeros, 4 (8 of 8 bits) of offsets, 4 and 16 of residual and
        # outliers. Values of both columns: as many, but for offsets. And 4 each of the residual's tokens.
        assert loop["HMMA"] == (144 if "ILi8ELi8E" in name else 140), (name, loop)
        for slow in ("I2F", "I2FP", "LDL", "STL"):
            assert not loop[slow], (name, slow, loop)
        assert bool(loop["LDGSTS"]) == (architecture == "sm_80"), (name, loop)
        assert bool(loop["UBLKCP"]) == (architecture == "sm_90"), (name, loop)


def main_loops(objects: Path, kernel: str = "decode") -> dict[tuple[str, str], Counter[str]]:
    """Instructions of every such kernel's loop over chunks: the backward branch around most products."""
    return {
        key: max(loops_of(listing), key=lambda loop: loop["HMMA"], default=Counter())
        for key, listing in listings(objects, kernel).items()
    }


def listings(objects: Path, kernels: str) -> dict[tuple[str, str], str]:
    """What the disassembler says of every kernel whose name has the pattern in it, by architecture and name."""
    cuobjdump = disassembler()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (pip install nvidia-cuda-cuobjdump), so instructions cannot be looked at")
    # It calls nvdisasm, which lies beside it.
    env = os.environ | {"PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump, "--dump-sass", str(objects)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found: dict[tuple[str, str], str] = {}
    architecture = ""
    for part in re.split(r"(?=code for sm_|Function : )", done.stdout):
        if head := re.match(r"code for (sm_\d+)", part):
            architecture = head[1]
        if (name := re.match(r"Function : (\S+)", part)) and re.search(kernels, name[1]):
            found[architecture, name[1]] = part
    return found


def loops_of(listing: str) -> list[Counter[str]]:
    """Instructions between every backward branch and where it leads."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)]
    names = [(at, re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]) for at, text in lines]
    found = []
    for at, text in lines:
        target = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            found.append(Counter(name for place, name in names if int(target[1], 16) <= place <= at))
    return found
