"""Caches of layers that share a latent, under transformers: what a step sees, what is kept, all batch operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers import CompressedCache
from tests import tiny
from tests.compression import compress, listed

KV = "method: xkv, group: 3, rank: {k: 0.5, v: 0.75}"
VALUES = "method: xkv, share: v, group: 2, rank: {k: 0.75, v: 0.5}"
PROMPT = "method: xkv, basis: prompt, group: 3, rank: {k: 0.25, v: 0.5}"


@pytest.fixture(scope="module")
def folders(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("groups")
    made = {}
    for name, stages in {
        "kv": (KV, "method: scalar, bits: 8"),
        "values": (VALUES, "method: scalar, bits: {k: 4, v: 8}"),
        "exact ends": (f"{KV}, sink: 3, recent: 5", "method: scalar, bits: 4"),
        "prompt": (PROMPT,),
        "prompt, exact ends": (f"{PROMPT}, sink: 3, recent: 5",),
        "whole": ("method: xkv, group: 4, rank: 1.0, metric: none", "method: scalar, bits: 16"),
        "whole prompt": ("method: xkv, basis: prompt, group: 4, rank: 1.0",),
    }.items():
        made[name] = root / name
        compress(base_model, root / name, listed(*stages))
    return made


@pytest.fixture(scope="module")
def model(base_model: Path) -> Any:
    return tiny.load_model(base_model)


ALL = ["kv", "values", "exact ends", "prompt", "prompt, exact ends"]


def tokens(batch: int = 1, length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(2, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, cache: Any, *steps: Tensor) -> Tensor:
    """Logits of all steps, one after the other."""
    return torch.cat([model(step, past_key_values=cache, use_cache=True).logits for step in steps], dim=1)


@pytest.mark.parametrize("name", ["whole", "whole prompt"])
def test_full_rank_in_sixteen_bits_is_the_base_model_within_the_rounding_of_halves(
    name: str, folders: dict[str, Path], model: Any
) -> None:
    text = tokens(2, 60)
    steps = text.split([30, 10, *[1] * 20], dim=1)
    expected = logits(model, None, text)
    found = logits(model, CompressedCache.from_pretrained(folders[name]), *steps)
    # Prompt factors are kept in the model's float32; latents are halves, 11 bits of mantissa.
    tolerance = 1e-4 if name == "whole prompt" else 3e-3
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ["kv", "values", "prompt"])
def test_first_step_is_exact_and_later_ones_are_not(name: str, folders: dict[str, Path], model: Any) -> None:
    text = tokens()
    cache, expected = CompressedCache.from_pretrained(folders[name]), logits(model, None, text)
    found = logits(model, cache, text[:, :40], text[:, 40:])
    if name != "values":  # keys with bases of their own are read as stored at once
        torch.testing.assert_close(found[:, :40], expected[:, :40], rtol=1e-4, atol=1e-4)
    assert (found[:, 40:] - expected[:, 40:]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["kv", "values"])
def test_later_steps_read_the_codecs_round_trip(name: str, folders: dict[str, Path], model: Any) -> None:
    codecs = load_codec(folders[name])
    cache = CompressedCache(codecs)
    generator = torch.Generator().manual_seed(4)
    first, second = (
        torch.randn(2, len(codecs), 2, tiny.NUM_KV_HEADS, length, tiny.HEAD_DIM, generator=generator)
        for length in (20, 3)
    )
    for index in range(len(codecs)):
        cache.update(first[0, index], first[1, index], index)
    read = [cache.update(second[0, index], second[1, index], index) for index in range(len(codecs))]
    for group in {codec.spec.group for codec in codecs if isinstance(codec, SharedCodec)}:
        for row in range(2):
            states = [[first[side, index, row].transpose(0, 1) for index in group] for side in (0, 1)]
            members: Any = [codecs[index] for index in group]
            expected = SharedCodec.round_trip(members, *states, torch.arange(20))
            for index, wanted in zip(group, expected, strict=True):
                for side in (0, 1):
                    stored = read[index][side][row, :, :20].transpose(0, 1)
                    torch.testing.assert_close(stored, wanted[side], rtol=1e-4, atol=1e-5)
                    if side == 1 or name == "kv":
                        assert torch.equal(read[index][side][row, :, 20:], second[side, index, row])


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_batch_are_independent(name: str, folders: dict[str, Path], model: Any) -> None:
    text = tokens(3)
    steps = text.split([40, 10, 1, 1, 8], dim=1)
    together = logits(model, CompressedCache.from_pretrained(folders[name]), *steps)
    for row in range(3):
        alone = logits(model, CompressedCache.from_pretrained(folders[name]), *(step[row : row + 1] for step in steps))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_crop_and_batch_operations(name: str, folders: dict[str, Path], model: Any) -> None:
    """Going back and going on again is as if the dropped tokens had never been."""
    steps, wrong = tokens(2, 44).split([40, 2, 2], dim=1), tokens(2, 4, seed=9)
    straight = logits(model, CompressedCache.from_pretrained(folders[name]), *steps)[:, -2:]
    cache = CompressedCache.from_pretrained(folders[name])
    logits(model, cache, *steps[:2], wrong)
    cache.crop(-4)
    assert cache.get_seq_length() == 42
    again = logits(model, cache, steps[2])
    if "exact ends" in name and not name.startswith("prompt"):
        # The window of exact tokens is shorter after a crop until it has filled again.
        assert (again - straight).abs().max() < 0.5 * straight.abs().max()
    else:
        torch.testing.assert_close(again, straight, rtol=2e-3, atol=2e-3)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = logits(model, cache, steps[2].flip(0)).flip(0)
    torch.testing.assert_close(swapped, again, rtol=2e-3, atol=2e-3) if "exact" not in name else None
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert logits(model, cache, tokens(2, 1)).shape[0] == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = logits(model, cache, *(step[:1] for step in steps))[:, -2:]
    torch.testing.assert_close(fresh, straight[:1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["kv", "values", "exact ends", "prompt", "prompt, exact ends"])
def test_bytes_are_those_stated(name: str, folders: dict[str, Path], model: Any) -> None:
    manifest = Manifest.load(folders[name])
    codecs = [codec for codec in load_codec(folders[name]) if codec is not None]
    cache = CompressedCache.from_pretrained(folders[name])
    logits(model, cache, tokens(1, 300), tokens(1, 1), tokens(1, 9))
    per_request = sum(codec.spec.bytes_per_request for codec in codecs)  # type: ignore[attr-defined]
    # What is not coded is stated in 16 bits a number, as engines serve; this model runs in float32.
    assert model.dtype == torch.float32
    plain = 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 4 * len(codecs)
    if name.startswith("prompt"):
        # Ten generated tokens are whole, and so are the ends, which do not count as factored.
        ends = 8 if "ends" in name else 0
        expected = 2 * ((300 - ends) * manifest.bytes_per_token.compressed + per_request) + 10 * plain
    else:
        expected = 310 * manifest.bytes_per_token.compressed + 2 * per_request
    assert cache.nbytes == expected


def test_exact_ends_help(folders: dict[str, Path], base_model: Path, model: Any, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "none", listed(KV, "method: scalar, bits: 4"))
    text = tokens(4, 100)
    steps = text.split([80, *[1] * 20], dim=1)
    expected = logits(model, None, text)[:, 80:]
    errors = [
        float((logits(model, CompressedCache.from_pretrained(folder), *steps)[:, 80:] - expected).norm())
        for folder in (folders["exact ends"], tmp_path / "none")
    ]
    assert errors[0] < errors[1]


def test_generate_runs_and_scores_are_taken_in_small_steps(folders: dict[str, Path], model: Any) -> None:
    for name in ALL:
        cache = CompressedCache.from_pretrained(folders[name])
        made = model.generate(tokens(2, 40), past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=2)
        assert made.shape == (2, 48)
        steps = CompressedCache.from_pretrained(folders[name]).scoring_steps(100, 2048)
        assert sum(steps) == 100
        assert steps == ([50, 50] if name.startswith("prompt") else [8] * 12 + [4])


def test_scores_of_a_text_show_the_loss(folders: dict[str, Path], base_model: Path) -> None:
    """In one forward pass they would be the base model's."""
    from kvcompress_eval.engines import open_engine
    from kvcompress_eval.tokenizer import TextTokenizer

    text = tokens(1, 101)[0].tolist()  # the last is only predicted

    def scores(folder: Path) -> Tensor:
        engine = open_engine("transformers", folder, TextTokenizer(base_model), max_context=512)
        return torch.from_numpy(engine.score(text).log_probs_T)

    expected = scores(base_model)
    for name, exact in (("kv", 8), ("prompt", 50)):
        found = scores(folders[name])
        torch.testing.assert_close(found[:exact], expected[:exact], rtol=1e-3, atol=1e-3)
        assert (found[exact:] - expected[exact:]).abs().mean() > 0.05
