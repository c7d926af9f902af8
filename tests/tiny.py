"""Tiny models of every supported architecture, made in the process, and compressed checkpoints of them.

Weights are random and three times the usual size, so that greedy tokens vary and depend on every earlier token. Those
of queries and attention outputs keep their size: with larger ones, a rounding difference of one engine against another
that moves one quantizer code would show in the logits at the size of ordinary margins between tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

import kvcompress.serving.transformers  # noqa: F401  # so that transformers reads compressed checkpoints
from kvcompress.checkpoint.manifest import (
    MANIFEST_FILE,
    BytesPerToken,
    Manifest,
    Parent,
    Sizes,
    package_versions,
)
from kvcompress.checkpoint.reader import QUANT_METHOD, Checkpoint
from kvcompress.checkpoint.verify import CODEC_FILE
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.checkpoint.writer import copy_shards, copy_side_files, write_file, write_tensors
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.file import to_tensors
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.loading import CONFIG_VERSION

ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 4, 4, 2, 32, 128


def save_model(directory: Path, architecture: str = "Llama", seed: int | None = None, **config: Any) -> Path:
    """Save a random model in float32 and return its folder."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": NUM_HEADS * HEAD_DIM,
        "intermediate_size": 256,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if architecture == "Mistral":
        settings["sliding_window"] = None
    model_config = getattr(transformers, f"{architecture}Config")(**settings | config)
    # Llama and Mistral have the same parameters: equal seeds would make them the same model.
    torch.manual_seed(ARCHITECTURES.index(architecture) + 1 if seed is None else seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ("q_proj", "q_norm", "o_proj")):
                parameter.mul_(3)
    model.save_pretrained(directory)
    return directory


def load_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def mixed_spec(num_kv_heads: int = NUM_KV_HEADS, head_dim: int = HEAD_DIM) -> CodecSpec:
    """Another encoding in every layer: bands of 8, 4 and 2 bits, none at all, floats, outliers, keys unlike values."""
    sides = [
        (SideSpec((Band(8, 8), Band(4, 8), Band(2, 8))), SideSpec((Band(8, 8), Band(4, 16)), 2)),
        None,
        (SideSpec((Band(16, head_dim),)), SideSpec((Band(32, head_dim),))),
        (SideSpec((Band(8, 16), Band(4, 16)), 1), SideSpec((Band(4, 16), Band(2, 8)))),
    ]
    return CodecSpec(tuple(None if pair is None else HeadsSpec(num_kv_heads, head_dim, *pair) for pair in sides))


def uniform_spec(bits: int, num_kv_heads: int = NUM_KV_HEADS, head_dim: int = HEAD_DIM) -> CodecSpec:
    """Full rank at one bit width in every layer."""
    side = SideSpec((Band(bits, head_dim),))
    return CodecSpec((HeadsSpec(num_kv_heads, head_dim, side, side),) * NUM_LAYERS)


def fit_codec(model: Any, spec: CodecSpec, seed: int = 0) -> list[HeadsCodec | None]:
    """Principal components of the keys and values of one forward pass on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (1, 512), generator=generator)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    return [
        None
        if layer is None
        else HeadsCodec(_principal(cached.keys[0], layer.k), _principal(cached.values[0], layer.v))
        for layer, cached in zip(spec.layers, cache.layers, strict=True)
    ]


def save_compressed(base: Path, directory: Path, spec: CodecSpec, seed: int = 0) -> Path:
    """Compress a saved model with a codec fitted by `fit_codec`; return the new folder, manifest included."""
    checkpoint = Checkpoint.open(base)
    parent = Parent.of(checkpoint, base.name)
    tensors = to_tensors(fit_codec(load_model(base), spec, seed))
    section = {"quant_method": QUANT_METHOD, "version": CONFIG_VERSION, "codec": spec.to_json()}
    config = json.dumps(checkpoint.config | {"quantization_config": section}).encode()
    full = 2 * NUM_KV_HEADS * HEAD_DIM * 4
    stored = sum(full if layer is None else layer.bytes_per_token for layer in spec.layers)
    with WorkDir.open(directory, {"base": str(base), "codec": spec.to_json(), "seed": seed}) as work:
        digests = copy_shards(checkpoint, work) | copy_side_files(checkpoint, work)
        digests |= write_file(work, "config.json", config) | write_tensors(work, CODEC_FILE, tensors)
        manifest = Manifest(
            parent=parent,
            recipe={"version": 1, "stages": []},
            seed=seed,
            calibration=None,
            versions=package_versions(),
            bytes_per_token=BytesPerToken(base=full * NUM_LAYERS, compressed=stored, ratio=full * NUM_LAYERS / stored),
            weights_bytes=Sizes(base=checkpoint.weights_bytes, compressed=checkpoint.weights_bytes),
            **digests.to_json(),
        )
        write_file(work, MANIFEST_FILE, manifest.to_bytes())
        work.publish()
    return directory


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids without the special tokens, one prompt per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def _principal(x_HTD: Tensor, side: SideSpec) -> SideCodec:
    mean_HD = x_HTD.mean(1)
    centred_HTD = x_HTD - mean_HD[:, None]
    variance_HD, vectors_HDD = torch.linalg.eigh(centred_HTD.mT @ centred_HTD / x_HTD.shape[1])
    basis_HDR = vectors_HDD.flip(-1)[..., : side.rank].contiguous()
    scale_HR = variance_HD.flip(-1)[..., : side.rank].clamp_min(1e-8).sqrt().contiguous()
    return SideCodec(side, mean_HD, basis_HDR, basis_HDR.mT.contiguous(), scale_HR)


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 300 tokens, enough for any text; id 0 begins a prompt, id 1 ends an answer."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["the cat sat on the mat and the rat ran at the cat " * 20], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|bos|>", eos_token="<|eos|>"
    ).save_pretrained(directory)
