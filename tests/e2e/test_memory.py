"""Peak memory of `compress` on a generated 2 GB checkpoint, as /usr/bin/time -v or the kernel counts it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcompress.checkpoint.safetensors_file import TensorSpec, build_header
from tests import tiny
from tests.compression import BALANCED

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 15, 2048, 8192, 32, 8, 64, 32000
SHARDS = 5
SAMPLES, LENGTH = 4, 128


def generate(directory: Path) -> dict[str, int]:
    """A bfloat16 Llama of 2 GB in five shards, written in pieces. Returns bytes of its largest layer and shard."""
    directory.mkdir()
    attention = {"q_proj": (HEADS * HEAD_DIM, HIDDEN), "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN)}
    attention |= {"v_proj": attention["k_proj"], "o_proj": (HIDDEN, HEADS * HEAD_DIM)}
    mlp = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    shapes: list[dict[str, tuple[int, ...]]] = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes.append({f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()})
        shapes[-1] |= {f"{prefix}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes[-1] |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = np.random.default_rng(0)
    weight_map, sizes = {}, []
    for shard in range(SHARDS):
        tensors = {
            name: shape
            for layer in shapes[shard * LAYERS // SHARDS : (shard + 1) * LAYERS // SHARDS]
            for name, shape in layer.items()
        }
        if shard == 0:
            tensors |= {"model.embed_tokens.weight": ends["model.embed_tokens.weight"]}
        if shard == SHARDS - 1:
            tensors |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": ends["lm_head.weight"]}
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        raw, header = build_header([TensorSpec(key, "BF16", shape) for key, shape in tensors.items()], {}, name)
        with open(directory / name, "wb") as file:
            file.write(raw)
            for info in header.tensors.values():
                # bfloat16 is the upper half of float32: small normal values, or ones for the norms.
                left = info.nbytes // 2
                while left:
                    count = min(left, 1 << 21)
                    left -= count
                    ones = len(info.shape) == 1
                    values = np.ones(count, np.float32) if ones else generator.standard_normal(count, np.float32) / 50
                    file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        sizes.append((directory / name).stat().st_size)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "dtype": "bfloat16",
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tiny.save_tokenizer(directory)
    layer_bytes = sum(2 * int(np.prod(shape)) for shape in shapes[0].values())
    return {"total": sum(sizes), "layer": layer_bytes, "shard": max(sizes)}


@pytest.mark.e2e
def test_peak_memory_of_a_2_gb_checkpoint(tmp_path: Path) -> None:
    base, out, recipe = tmp_path / "base", tmp_path / "out", tmp_path / "recipe.yaml"
    sizes = generate(base)
    assert sizes["total"] > 1.9e9
    recipe.write_text(BALANCED)
    command = [sys.executable, "-m", "kvcompress_cli", "compress", str(base), "-r", str(recipe), "-o", str(out)]
    command += ["--samples", str(SAMPLES), "--length", str(LENGTH)]
    measure = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:])\n"
        "_, status, usage = os.wait4(child.pid, 0)\n"
        "print('peak_kib', usage.ru_maxrss)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    done = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak_kib (\d+)", done.stdout)
    assert found
    peak = int(found.group(1)) * 1024
    activations = SAMPLES * LENGTH * HIDDEN * 4
    bound = 1.25 * (sizes["layer"] + activations + sizes["shard"])
    print(f"peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB (1.25 x (largest layer, activations, a shard))")
    shutil.rmtree(base)
    assert peak < bound
