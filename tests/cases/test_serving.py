"""Inputs that a server must take, or refuse in one sentence before it has worked for long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint.verify import accept
from kvcompress.pipeline import decompress
from kvcompress.serving.transformers import CompressedCache
from tests import compression, quantize, require, tiny
from tests.e2e import reference, vllm_engine

CODEC = "  - {method: pca}\n  - {method: scalar, bits: {k: 8, v: 8}}\n"
FACTORS = "  - {method: fwsvd, weighting: activation, ranks: uniform, removed: 0.3, targets: [q_proj, down_proj]}\n"
LATENT = "  - {method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}\n"
UNHASHED = {"KVCOMPRESS_SKIP_VERIFY": "1"}


def compressed(base: Path, out: Path, stages: str = CODEC) -> Path:
    compression.compress(base, out, stages, samples=4, length=64)
    return out


def model(folder: Path, architecture: str = "Llama", **config: object) -> Path:
    base = tiny.save_model(folder, architecture, vocab_size=300, num_hidden_layers=2, **config)
    tiny.save_tokenizer(base)
    return base


def without(whole: Path, target: Path, *names: str) -> Path:
    """A copy of a checkpoint whose weights lack these tensors."""
    shutil.copytree(whole, target)
    tensors = load_file(target / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Checkpoints that lack one tensor each, and what must be named."""
    folder = tmp_path_factory.mktemp("lacking")
    untied = compressed(model(folder / "qwen", "Qwen2", tie_word_embeddings=False), folder / "whole-untied")
    factors = compressed(model(folder / "base"), folder / "whole-factors", FACTORS)
    latent = compressed(folder / "base", folder / "whole-latent", LATENT)
    base8 = quantize.save(folder / "base", folder / "int8", quantize.int8, quantize.int8_config(quantize.PER_TOKEN))
    int8 = compressed(base8, folder / "whole-int8")
    attention = "model.layers.1.self_attn"
    found = [
        (untied, "model.norm.weight"),
        (untied, "lm_head.weight"),
        (untied, f"{attention}.v_proj.bias"),
        (factors, f"{attention}.q_proj.up_weight"),
        (latent, f"{attention}.k_up"),
        (int8, f"{attention}.o_proj.weight_scale"),
    ]
    return [(without(whole, folder / f"lacking-{number}", name), name) for number, (whole, name) in enumerate(found)]


@pytest.mark.e2e
def test_no_server_starts_without_one_of_its_tensors(lacking: list[tuple[Path, str]]) -> None:
    require.need("vllm")
    messages = vllm_engine.refusals(*({"model": str(path)} for path, _ in lacking), env=UNHASHED)
    for (path, name), message in zip(lacking, messages, strict=True):
        assert "lacks" in message, (path, message)
        layer, _, tensor = name.rpartition(".")
        # vLLM has q, k and v in one.
        assert layer.replace("q_proj", "qkv_proj") in message or layer in message, (name, message)
        assert tensor in message, (name, message)


def test_transformers_does_not_make_up_what_a_checkpoint_lacks(lacking: list[tuple[Path, str]]) -> None:
    for path, name in lacking:
        with pytest.raises(ValueError, match="lacks ") as refusal:
            tiny.load_model(path)
        assert name.rpartition(".")[0].replace("qkv_proj", "q_proj") in str(refusal.value)


SNIPPET = """
import sys
import torch
{first}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
{second}
inputs = {{"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}}
answer = model.generate(
    **inputs, past_key_values=CompressedCache.from_pretrained(sys.argv[1]), max_new_tokens=12, do_sample=False
)
print(answer[0].tolist())
"""
TRANSFORMERS = "from transformers import AutoModelForCausalLM"
KVCOMPRESS = "from kvcompress.serving.transformers import CompressedCache"


def in_a_new_process(script: str, model: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stages", [FACTORS + CODEC, LATENT, "int8"])
def test_readmes_snippet_runs_the_checkpoints_own_weights(stages: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    if stages == "int8":
        base, stages = quantize.save(base, tmp_path / "int8", quantize.int8, quantize.int8_config()), CODEC
    out = compressed(base, tmp_path / "out", stages)
    found = in_a_new_process(SNIPPET.format(first=f"{TRANSFORMERS}\n{KVCOMPRESS}", second=""), out)
    assert found.returncode == 0, found.stderr
    if FACTORS in stages:  # products of the factors in ordinary layers
        decompress.decompress(out, tmp_path / "plain", lambda *_: None)
    loaded = tiny.load_model(tmp_path / "plain" if FACTORS in stages else out)
    cache = CompressedCache.from_pretrained(out)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    answer = loaded.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert found.stdout.split("\n")[-2] == str(answer[0].tolist())


def test_a_model_loaded_before_the_import_is_refused(tmp_path: Path) -> None:
    out = compressed(model(tmp_path / "base"), tmp_path / "out", FACTORS + CODEC)
    found = in_a_new_process(SNIPPET.format(first=TRANSFORMERS, second=KVCOMPRESS), out)
    assert "import kvcompress.serving.transformers before from_pretrained" in found.stderr


def test_a_server_minds_the_model_and_not_its_card(tmp_path: Path) -> None:
    require.need("vllm")
    from kvcompress.serving.vllm.startup import check_files

    out = compressed(model(tmp_path / "base"), tmp_path / "out")
    (out / "README.md").write_text("an edited card")
    (out / "LICENSE").write_text("added")
    (out / "eval.json").write_text("{}")
    check_files(out)
    (out / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: .* verify .* --accept tokenizer_config.json"):
        check_files(out)
    accept(out, ["tokenizer_config.json"])
    check_files(out)


@pytest.mark.e2e
def test_a_layer_that_carries_nothing_is_served_without_alarm(tmp_path: Path) -> None:
    require.need("vllm")
    base = model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for part in ("k_proj", "v_proj"):
        tensors[f"model.layers.1.self_attn.{part}.weight"].zero_()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    out = compressed(base, tmp_path / "out", "  - {method: pca}\n  - {method: scalar, bits: {k: 4, v: 16}}\n")
    prompts, expected = reference.greedy(out, [5, 40, 130], 48)
    served = vllm_engine.run(out, prompts, max_tokens=48)
    assert served["tokens"] == [expected]
    assert "start-up canary passed in 2 layers" in served["log"]
    assert served["kvcompress"]["kvcompress_sentinel_failures_total"] == 0
