"""What happens before the first token: registration, version check, cache sizes, verification, head slices."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases.blocks import random_codec
from benchmarks.cases.blocks_sides import cuda_sides
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from tests import require, tiny
from tests.ops import emulated

require.need("vllm")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvcompress.forms import FORMS
from kvcompress.serving.vllm import compat, register
from kvcompress.serving.vllm.blocks import BlocksImpl
from kvcompress.serving.vllm.heads import cache_spec
from kvcompress.serving.vllm.quantization import KVCompressConfig
from kvcompress.serving.vllm.served import Served
from kvcompress.serving.vllm.startup import SKIP_VERIFY, Startup, check_files, checkpoint_directory, heads_of_rank
from tests.serving.vllm import engines

SECTION = {"quant_method": "kvcompress", "version": 2, "codec": tiny.mixed_spec().to_json()}


def layer_spec(index: int) -> HeadsSpec:
    spec = tiny.mixed_spec().layers[index]
    assert spec is not None
    return spec


def test_register_may_be_called_again() -> None:
    register()
    register()
    assert compat.QUANTIZATION_METHODS.count("kvcompress") == 1


def test_backends_have_names_of_their_own_by_which_vllm_finds_them() -> None:
    rooms = [form.serving("vllm") for form in FORMS.values()]
    found = [
        kind
        for room in rooms
        for kind in vars(room).values()
        if isinstance(kind, type) and issubclass(kind, compat.Backend)
    ]
    names = [kind.get_name() for kind in found]
    assert len(set(names)) == len(found) == 6
    assert [AttentionBackendEnum[name].get_class() for name in names] == found


def test_importing_the_plug_in_imports_no_engine() -> None:
    # Entry points are imported in every process that merely asks vLLM for its version.
    code = "import sys, kvcompress.serving.vllm; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


@pytest.mark.parametrize("found", ["0.30.2", "0.33.0", "1.32.0", "dev"])
def test_other_versions_are_refused_by_name(found: str) -> None:
    with pytest.raises(RuntimeError, match=rf"found vLLM {found}; .* vLLM >= 0\.31, < 0\.33"):
        compat.check_version(found)


@pytest.mark.parametrize("found", ["0.31.0", "0.32.1rc1.dev3+gabc", "0.32"])
def test_supported_versions_pass(found: str) -> None:
    compat.check_version(found)


@pytest.mark.parametrize("index", [0, 2, 3])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_a_page_takes_the_bytes_of_the_layout(index: int, block_size: int) -> None:
    spec = cache_spec(layer_spec(index), block_size)
    assert spec.page_size_bytes == PageLayout.of(layer_spec(index), block_size).page_bytes
    assert pickle.loads(pickle.dumps(spec)) == spec
    # vLLM scales blocks of hybrid models; a record must scale with them.
    doubled = spec.copy_with_new_block_size(2 * block_size)
    assert doubled.page_size_bytes == PageLayout.of(layer_spec(index), 2 * block_size).page_bytes


def test_layers_of_other_sizes_do_not_merge() -> None:
    # vLLM's grouping understands an AssertionError, and nothing else, as "keep these apart".
    with pytest.raises(AssertionError):
        compat.FullAttentionSpec.merge([cache_spec(layer_spec(0), 32), cache_spec(layer_spec(3), 32)])


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_of_each_rank(num_kv_heads: int, world_size: int, expected: list[tuple[int, int]]) -> None:
    assert [heads_of_rank(num_kv_heads, rank, world_size) for rank in range(world_size)] == expected


def test_the_config_travels_between_processes() -> None:
    config = KVCompressConfig.from_config(SECTION)
    assert pickle.loads(pickle.dumps(config)).codec_spec == tiny.mixed_spec()


@pytest.mark.parametrize("change", [{"version": 3}, {"codec": {}}])
def test_a_section_that_cannot_be_read_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"kvcompress format|cannot be read"):
        KVCompressConfig.from_config(SECTION | change)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny.save_compressed(tiny.save_model(folder / "base"), folder / "model", tiny.mixed_spec())


def flipped(model: Path, target: Path, file: str) -> Path:
    shutil.copytree(model, target)
    data = bytearray((target / file).read_bytes())
    data[-1] ^= 0x80
    (target / file).write_bytes(data)
    return target


def test_an_untouched_checkpoint_passes(model: Path) -> None:
    check_files(model)


@pytest.mark.parametrize("file", ["model.safetensors", "kvcompress/codec.safetensors"])
def test_the_tensor_with_a_flipped_bit_is_named(model: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match=rf"{file}::\S+: expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}"):
        check_files(flipped(model, tmp_path / "copy", file))


def test_weights_can_be_skipped_but_the_codec_cannot(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SKIP_VERIFY, "1")
    check_files(flipped(model, tmp_path / "weights", "model.safetensors"))
    with pytest.raises(ValueError, match=r"codec\.safetensors::layers"):
        check_files(flipped(model, tmp_path / "codec", "kvcompress/codec.safetensors"))


def test_a_hub_id_is_found_in_the_cache_by_its_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    found = checkpoint_directory(engines.engine(model="org/tiny", revision="v2", download_dir=str(tmp_path)))
    assert found == repository / "snapshots" / commit
    check_files(found)


def test_a_local_folder_is_used_as_it_is(model: Path) -> None:
    assert checkpoint_directory(engines.engine(model=str(model))) == model


CAPTURED, TORCH, ALONE = (True, True), (False, False), (True, False)


@pytest.mark.parametrize(
    ("layers", "kind", "told"),
    [
        ([CAPTURED, CAPTURED], "info", "0-1: CUDA kernels"),
        ([CAPTURED, TORCH], "warning", "0: CUDA kernels, 1: torch code (slower)"),
        ([CAPTURED, ALONE], "info", "0: CUDA kernels, 1: CUDA kernels outside of full graphs"),
        ([TORCH], "warning", "0: torch code (slower)"),
    ],
)
def test_an_operator_of_a_gpu_is_told_which_layers_its_kernels_attend(
    layers: list[tuple[bool, bool]], kind: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []
    logger = {name: lambda text, line, name=name: said.append((name, line)) for name in ("info", "warning")}
    monkeypatch.setattr(compat, "logger", SimpleNamespace(**logger))
    monkeypatch.setattr(compat, "tensor_parallel", lambda: (0, 1))
    begun = Startup(engines.engine(device=torch.device("cuda")), [])
    for index, (on_kernels, captured) in enumerate(layers):
        layer = engines.layer(4, 1, 32, index)
        layer.module.impl = SimpleNamespace(op=SimpleNamespace(on_kernels=on_kernels))
        builder = SimpleNamespace(captured_queries=64 * captured)
        layer.module.attn_backend = SimpleNamespace(builder=builder)
        begun._note(Served(index, layer, LatentCodec(LatentSpec(32, 24, 2))), 1, 32)
    begun.report()
    assert [found for found in said if "attention by layer" in found[1]] == [(kind, f"attention by layer: {told}")]


def test_layers_of_blocks_say_whether_kernels_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    def impls() -> list[BlocksImpl]:
        found = [BlocksImpl(None, 4, 64, 1.0, 2) for _ in range(2)]
        for impl, specs in zip(found, (cuda_sides(64, 4), cuda_sides(64, 4, low_rank=10)), strict=True):
            impl.use_codec(random_codec(2, 64, specs), torch.device("cpu"), 64)
        return found

    assert [impl.op.on_kernels for impl in impls()] == [False, False]
    emulated.count_as_gpu(monkeypatch)
    on_gpu = impls()
    assert [impl.op.on_kernels for impl in on_gpu] == [True, False]
    # The rows of queries and of their answers, at least.
    assert on_gpu[0].workspace_bytes(torch.empty(100_000, 4, 64)) > 100_000 * 4 * 64 * 4 * 2
