"""Finding the library, and what happens without it."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases.heads import bands, exact, random_cache, random_codec, relative_error
from kvcompress.ops import library
from kvcompress.ops.heads.attention import bind
from kvcompress.ops.heads.cpu import CpuHeads
from kvcompress.ops.heads.reference import HeadsOp


@pytest.fixture
def fresh() -> Iterator[None]:
    """`load` forgets what it found, before and after."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf to look into the library with")
def test_the_library_needs_neither_torch_nor_python() -> None:
    """One wheel for every version of both: nothing is linked but the compiler's and the system's libraries."""
    compiled = library.load()
    assert compiled is not None
    written = subprocess.run(
        ["readelf", "--dynamic", compiled._name], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\.so", written)
    assert set(needed) <= {
        "libgomp",
        "libomp",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "ld-linux-x86-64",
    }
    assert "libc" in needed


@pytest.mark.usefixtures("fresh")
def test_a_missing_library_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_FILE", "not-there.so")
    with pytest.warns(UserWarning, match="C\\+\\+17 compiler"):
        assert library.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load() is None


@pytest.mark.usefixtures("fresh")
def test_an_empty_variable_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.PATH_VARIABLE, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load() is None


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("no library")
    monkeypatch.setenv(library.PATH_VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"kernels\.so is not a library"):
        library.load()


@pytest.mark.usefixtures("compiled")
def test_another_interface_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    try:
        with pytest.warns(UserWarning, match="build the library again"):
            assert library.load() is None
    finally:
        library.load.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LEVEL_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="'avx1024'; expected one of portable"):
        library.level()


@pytest.mark.usefixtures("without_library")
def test_attention_without_the_library() -> None:
    codec = random_codec(2, 64, bands((8, 16), (4, 24)), bands((16, 40)))
    cache = replace(random_cache(codec, [40, 9, 17]), op=bind(codec, "cpu"))
    query_THD = torch.randn(5, 8, 64, generator=torch.Generator().manual_seed(1))
    output_THD, lse_TH = cache.attend(query_THD, [1, 0, 4])
    expected_THD, expected_TH = exact(cache, query_THD, [0, 1, 1, 5], 0.125)
    assert relative_error(output_THD, expected_THD) < 1e-5
    torch.testing.assert_close(lse_TH.double(), expected_TH, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_library")
def test_append_without_the_library() -> None:
    codec = random_codec(2, 64, bands((8, 16), (4, 24)), bands((16, 40)))
    cache = random_cache(codec, [40])
    again = cache.pages_NHX.clone()
    again[cache.block_table_RN[0, :3].long()] = 0xFF
    generator = torch.Generator().manual_seed(0)
    keys_THD = 1.5 * torch.randn(40, 2, 64, generator=generator)
    values_THD = 1.5 * torch.randn(40, 2, 64, generator=generator)
    token_T = torch.arange(40)
    slots_T = cache.block_table_RN[0].long()[token_T // 16] * 16 + token_T % 16
    bind(codec, "cpu").append(again, keys_THD, values_THD, slots_T)
    assert torch.equal(again, cache.pages_NHX)


@pytest.mark.usefixtures("compiled")
def test_a_shape_the_kernels_do_not_cover_goes_to_the_reference() -> None:
    codec = random_codec(1, 20, bands((8, 16)), bands((8, 8)))
    cache = replace(random_cache(codec, [30]), op=bind(codec, "cpu"))
    assert type(cache.op) is HeadsOp
    assert type(bind(random_codec(1, 24, bands((8, 16)), bands((8, 8))), "cpu")) is CpuHeads
    query_THD = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    output_THD, _ = cache.attend(query_THD, [2], 0.2)
    assert relative_error(output_THD, exact(cache, query_THD, [0, 2], 0.2)[0]) < 1e-5
