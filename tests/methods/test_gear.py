"""The gear encoding from recipe to checkpoint, and under transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import Profile
from kvcompress.methods.gear import Gear, GearConfig
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.decompress import decompress
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import compression, tiny
from tests.compression import recipe

ROOT = Path(__file__).parents[2]
REFERENCE_MODEL = ROOT / "assets" / "reference-model"
BLOCK = 32
GEAR = "  - {method: gear, bits: {k: 4, v: 2}, block: 32}\n"
IDENTITY = "  - {method: pca, metric: none}\n  - {method: gear, bits: 8, outliers: 1.0, block: 32}\n"


def compress(model: Path, out: Path, text: str, **options: Any) -> Manifest:
    compression.compress(model, out, text, **options)
    return Manifest.load(out)


def spec(channels: int = 64, **parameters: Any) -> BlocksSpec:
    geometry = ModelGeometry.from_config(Checkpoint.open(REFERENCE_MODEL).config)
    config = GearConfig.model_validate({"method": "gear", **parameters})
    [found] = Gear().layers(config, geometry, [Profile(channels, channels)])
    return found


def test_defaults_are_the_papers_and_the_bytes_add_up() -> None:
    found = spec()
    # Per head and block of 64 x 64: codes, a scale and a zero per channel (token), two factors, 2 % of the entries.
    outliers = 88
    side = 64 * 64 * 2 // 8 + 64 * 2 * 2 + 2 * (64 + 64) * 2 + outliers * (2 + 2)
    assert (found.k.nbytes, found.v.nbytes) == (side, side)
    assert found.k.outliers == outliers
    assert found.record_bytes == -(-2 * side // 64) * 64
    assert found.bytes_per_token == 2 * found.record_bytes // 64
    assert spec(16).v.group == 16, "values of a token share a group at most as wide as the rank"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"outliers": 1.5}, "outliers"),
        ({"block": 40}, "block"),
        ({"block": 96, "group": 64}, "do not divide a block of 96"),
        ({"rank": -1}, "rank"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**parameters)


@pytest.fixture(scope="module")
def compressed(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gear") / "out"
    compress(base_model, out, "  - {method: pca, rank: {k: 1.0, v: 0.75}}\n" + GEAR)
    return out


def test_plan_and_manifest_agree(compressed: Path, base_model: Path) -> None:
    text = "  - {method: pca, rank: {k: 1.0, v: 0.75}}\n" + GEAR
    made = planning.make(Checkpoint.open(base_model), recipe(text), str(base_model)).to_json()
    manifest = Manifest.load(compressed)
    assert verify(compressed).ok
    assert made["bytes_per_token"]["compressed"] == manifest.bytes_per_token.compressed
    for planned, found in zip(made["layers"], manifest.layers, strict=True):
        assert planned["bytes_per_token"] == found["bytes_per_token"]
        assert planned["v"]["rank"] == 24
        for side in ("k", "v"):
            assert planned[side] == {key: found[side][key] for key in planned[side]}


def test_same_inputs_same_bytes(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out", "  - {method: pca, rank: {k: 1.0, v: 0.75}}\n" + GEAR)
    for name in ("codec.safetensors", "manifest.json"):
        assert (tmp_path / "out" / "kvcompress" / name).read_bytes() == (compressed / "kvcompress" / name).read_bytes()


def test_cache_really_holds_the_stated_bytes(compressed: Path) -> None:
    model, cache = tiny.load_model(compressed), CompressedCache.from_pretrained(compressed)
    prepare(model, cache)
    with torch.no_grad():
        model(torch.tensor(tiny.prompts([3 * BLOCK + 7])), past_key_values=cache)
    per_token = Manifest.load(compressed).bytes_per_token.compressed
    open_block = 7 * tiny.NUM_LAYERS * 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 4
    assert cache.nbytes == 3 * BLOCK * per_token + open_block
    assert cache.get_seq_length() == 3 * BLOCK + 7


def logits(model: Any, cache: Any, tokens: Tensor, cuts: list[int]) -> Tensor:
    prepare(model, cache)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(cuts, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("cuts", [[31, 1, 1, 67], [32, 64, 4], [10, 60, 30], [64, 1, 35]])
def test_results_do_not_depend_on_how_a_prompt_is_cut(compressed: Path, cuts: list[int]) -> None:
    model, tokens = tiny.load_model(compressed), torch.tensor(tiny.prompts([100]))
    whole = logits(model, CompressedCache.from_pretrained(compressed), tokens, [100])
    found = logits(model, CompressedCache.from_pretrained(compressed), tokens, cuts)
    # A rounding difference may move a code; what the rule gets wrong moves logits by far more.
    assert float((found - whole).abs().max()) < 0.02 * float(whole.std())
    with torch.no_grad():
        base = model(tokens).logits
    assert float((whole - base).abs().max()) > 0.1 * float(whole.std()), "nothing was compressed"
    assert torch.allclose(whole[:, : BLOCK - 1], base[:, : BLOCK - 1], atol=1e-3), "an open block is exact"


def test_batch_rows_do_not_share_factors(compressed: Path) -> None:
    model = tiny.load_model(compressed)
    tokens = torch.stack([torch.tensor(tiny.prompts([100], seed)[0]) for seed in range(3)])
    together = CompressedCache.from_pretrained(compressed)
    batch = logits(model, together, tokens, [100])
    for row in range(3):
        alone = logits(model, CompressedCache.from_pretrained(compressed), tokens[row : row + 1], [100])
        assert float((batch[row] - alone[0]).abs().max()) < 0.02 * float(alone.std())
    layer = together.layers[0]
    different = (layer.records[0] != layer.records[1]).float().mean()
    assert float(different) > 0.5


def test_an_unprepared_model_is_told_so(compressed: Path) -> None:
    model, cache = tiny.load_model(compressed), CompressedCache.from_pretrained(compressed)
    tokens = torch.tensor(tiny.prompts([BLOCK - 1]))
    with torch.no_grad():
        model(tokens, past_key_values=cache)  # a block's worth needs nothing
        with pytest.raises(ValueError, match=r"prepare\(model, cache\)"):
            model(torch.tensor(tiny.prompts([70])), past_key_values=cache)


def test_a_prepared_model_still_takes_plain_caches(compressed: Path) -> None:
    model, tokens = tiny.load_model(compressed), torch.tensor(tiny.prompts([70]))
    with torch.no_grad():
        before = model(tokens, past_key_values=DynamicCache()).logits
        prepare(model, CompressedCache.from_pretrained(compressed))
        after = model(tokens, past_key_values=DynamicCache()).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_padded_rows_give_their_own_tokens(compressed: Path) -> None:
    """Padding that fills whole blocks changes nothing: the row's own blocks start where they would."""
    model = tiny.load_model(compressed)
    tokens = torch.tensor(tiny.prompts([70]))
    alone = logits(model, CompressedCache.from_pretrained(compressed), tokens, [70])
    cache = CompressedCache.from_pretrained(compressed)
    prepare(model, cache)
    padded = torch.cat([torch.zeros(1, BLOCK, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :BLOCK] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert float((found[:, BLOCK:] - alone).abs().max()) < 0.02 * float(alone.std())


def test_only_the_open_block_can_be_taken_back(compressed: Path) -> None:
    model, cache = tiny.load_model(compressed), CompressedCache.from_pretrained(compressed)
    tokens = torch.tensor(tiny.prompts([70]))
    logits(model, cache, tokens, [70])
    cache.crop(-3)
    assert cache.get_seq_length() == 67
    again = logits(model, cache, tokens[:, 67:], [3])
    whole = logits(model, CompressedCache.from_pretrained(compressed), tokens, [70])
    torch.testing.assert_close(again, whole[:, 67:], atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="6 are not compressed"):
        cache.crop(-7)


def test_rows_of_a_batch_can_be_chosen_and_repeated(compressed: Path) -> None:
    model, cache = tiny.load_model(compressed), CompressedCache.from_pretrained(compressed)
    tokens = torch.stack([torch.tensor(tiny.prompts([70], seed)[0]) for seed in range(2)])
    logits(model, cache, tokens[:, :60], [60])
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = logits(model, cache, tokens.flip(0)[:, 60:], [10])
    whole = logits(model, CompressedCache.from_pretrained(compressed), tokens, [70])
    assert float((swapped.flip(0) - whole[:, 60:]).abs().max()) < 0.02 * float(whole.std())
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].records.shape[0] == 4


def test_nothing_is_lost_at_full_rank_with_every_entry_exact(base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out", IDENTITY)
    model, tokens = tiny.load_model(base_model), torch.tensor(tiny.prompts([100]))
    with torch.no_grad():
        base = model(tokens).logits
    ours = logits(model, CompressedCache.from_pretrained(tmp_path / "out"), tokens, [100])
    assert float((base - ours).abs().max()) < 1e-3


def test_decompress_gives_the_base_model_back(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    decompress(compressed, tmp_path / "plain", lambda *_: None)
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (base_model / "model.safetensors").read_bytes()


def test_error_is_below_quantize_only_on_every_layer_of_the_reference_model(tmp_path: Path) -> None:
    compress(REFERENCE_MODEL, tmp_path / "out", "  - {method: gear}\n", samples=4, length=128)
    model = tiny.load_model(REFERENCE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_MODEL)
    text = (REFERENCE_MODEL / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        cached = model(tokens, use_cache=True).past_key_values.layers
    for codec, layer in zip(load_codec(tmp_path / "out"), cached, strict=True):
        assert isinstance(codec, BlocksCodec)
        for side, states in ((codec.k, layer.keys), (codec.v, layer.values)):
            blocks = states[0].unflatten(1, (-1, 64)).transpose(0, 1)
            for bits in (2, 4, 8):
                plain = replace(side.spec, bits=bits, low_rank=0, outliers=0)
                gear = replace(side.spec, bits=bits)
                assert error(replace(side, spec=gear), blocks) < error(replace(side, spec=plain), blocks)


def error(side: BlockSideCodec, blocks: Tensor) -> float:
    """Relative error of the latents, in the basis' metric."""
    exact = (blocks - side.mean_HD[:, None]) @ side.basis_HDR
    found = side.decode(side.encode(blocks)) * side.scale_HR[:, None]
    return float((found - exact).norm() / exact.norm())
