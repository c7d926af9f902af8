"""Keys before RoPE and values of whole texts, by transformers' own forward pass; errors of xkv's bases on them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.serving.loading import load_codec
from tests import compression, tiny
from tests.compression import listed

States = dict[str, list[Tensor]]
"""Per side and layer, `[tokens, heads, head_dim]`."""


@torch.no_grad()
def states(folder: Path, tokens_NT: Tensor, offsets_N: list[int]) -> States:
    """States of some samples, each a sequence by itself whose positions begin at its offset."""
    model = tiny.load_model(folder)
    rotary = LlamaRotaryEmbedding(model.config)
    found: States = {"k": [], "v": []}
    for tokens_T, offset in zip(tokens_NT, offsets_N, strict=True):
        positions = torch.arange(offset, offset + len(tokens_T))[None]
        cache = DynamicCache()
        model(tokens_T[None], position_ids=positions, past_key_values=cache)
        cos, sin = (table[0, :, None] for table in rotary(torch.zeros(1), positions))
        for index, layer in enumerate(cache.layers):
            keys, values = (x[0].transpose(0, 1) for x in (layer.keys, layer.values))
            unrotated = (keys * cos - rotate_half(keys) * sin) / rotary.attention_scaling**2
            for side, x in (("k", unrotated), ("v", values)):
                if index == len(found[side]):
                    found[side].append(x)
                else:
                    found[side][index] = torch.cat([found[side][index], x])
    return found


def compress(model: Path, out: Path, xkv: str, encoding: str = "bits: 16", **options: int) -> list[SharedCodec]:
    """Compress with an xkv stage, given as YAML fields in braces, and return the codecs."""
    compression.compress(model, out, listed(f"method: xkv, {xkv}", f"method: scalar, {encoding}"), **options)
    codecs = load_codec(out)
    assert all(isinstance(codec, SharedCodec) for codec in codecs)
    return codecs  # type: ignore[return-value]


def basis_error(codecs: list[SharedCodec], group: tuple[int, ...], side: str, found: States) -> float:
    """Relative error of a group's states through its bases, without the encoding of latents."""
    parts = [codecs[index].shared_sides[side] for index in group]
    latent = torch.stack([part.part(found[side][i]) for part, i in zip(parts, group, strict=True)]).sum(0)
    lost = sum(
        float((part.expand(latent) - found[side][i]).double().square().sum())
        for part, i in zip(parts, group, strict=True)
    )
    energy = sum(
        float((found[side][i] - part.mean_HD).double().square().sum()) for part, i in zip(parts, group, strict=True)
    )
    return (lost / energy) ** 0.5


def held_out_errors(model: Path, max_error: float, scratch: Path) -> dict[str, float]:
    """Groups found on the built-in text: errors of each on the model's held-out text, by side and layers."""
    codecs = compress(
        model,
        scratch / "out",
        f"group: auto, max_error: {max_error}, rank: {{k: 0.5, v: 0.75}}, metric: none",
        samples=16,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer((model / "heldout.txt").read_text(), add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id]
    tokens_NT = torch.tensor([bos + ids[start : start + 511] for start in range(0, 8 * 511, 511)])
    found = states(model, tokens_NT, [0] * len(tokens_NT))
    groups = sorted({codec.spec.group for codec in codecs})
    assert [index for group in groups for index in group] == list(range(len(codecs)))
    return {f"{side} {group}": basis_error(codecs, group, side, found) for group in groups for side in ("k", "v")}
