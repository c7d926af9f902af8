"""Exact where nothing is dropped, and every approximation as its formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvcompress import modeling
from kvcompress import recipe as recipes
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.geometry import ModelGeometry
from kvcompress.methods import rorope, transmla, transmla_layers
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.decompress import decompress
from kvcompress.serving.transformers import CompressedCache
from tests import compression, tiny
from tests.compression import listed, tree_sha256

KEYS = tiny.NUM_KV_HEADS * tiny.HEAD_DIM
FULL = f"rope_dim: {KEYS}, kv_lora_rank: {KEYS}, freqfold: 1"
PAPER = "rotation: orthogonal, dropped_rope: none"
LOSSY = "rope_dim: 32, kv_lora_rank: 48, freqfold: 1"
AUTO = "target_ratio: 1.6"


@pytest.fixture(autouse=True)
def _registered() -> None:
    modeling.register()


def recipe(stage: str, after: str = "") -> recipes.Recipe:
    return compression.recipe(listed(f"method: transmla, {stage}") + after)


def compress(model: Path, out: Path, stage: str, progress: Any = lambda *_: None, **options: Any) -> planning.Plan:
    return compression.compress(model, out, listed(f"method: transmla, {stage}"), progress, **{"samples": 4} | options)


def logits(directory: Path, tokens: int = 150) -> torch.Tensor:
    with torch.no_grad():
        return tiny.load_model(directory)(torch.tensor(tiny.prompts([tokens]))).logits


def base_of(directory: Path, architecture: str, **config: Any) -> Path:
    base = tiny.save_model(directory, architecture, vocab_size=300, **config)
    tiny.save_tokenizer(base)
    return base


@pytest.fixture(scope="module")
def converted(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transmla") / "out"
    compress(base_model, out, AUTO)
    return out


def test_any_candidate_may_be_the_best(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep equally many channels per token; weights are as large as planned, or smaller."""
    geometry = ModelGeometry.from_config(Checkpoint.open(base_model).config)
    stage = transmla.TransMlaConfig.model_validate({"method": "transmla", "target_ratio": 1.6})
    choices = transmla.candidates(stage, geometry)
    assert len({choice.rope_dim for choice in choices}) > 1
    assert len({choice.rope_dim + choice.rank for choice in choices}) == 1
    monkeypatch.setattr(transmla_layers, "choose", lambda *_: choices[-1])
    plan = compress(base_model, tmp_path / "out", AUTO)
    made = Checkpoint.open(tmp_path / "out")
    assert made.config["kv_lora_rank"] == choices[-1].rank
    assert made.weights_bytes < plan.compressed_weights_bytes
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral", "Llama with biases"])
@pytest.mark.parametrize("options", [FULL, f"{FULL}, {PAPER}"], ids=["unitary", "as in the paper"])
def test_nothing_dropped_nothing_lost(architecture: str, options: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"attention_bias": True} if "biases" in architecture else {}
    base = base_of(tmp_path / "base", architecture.split()[0], **config)
    if config or architecture == "Qwen2":
        base = _with_random_biases(base, tmp_path / "biased")
    compress(base, tmp_path / "out", options)
    expected, found = logits(base), logits(tmp_path / "out")
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-4
    decompress(tmp_path / "out", tmp_path / "plain", lambda *_: None)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "plain")
    assert before.config == after.config
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        torch.testing.assert_close(after.read(name), before.read(name), rtol=1e-5, atol=1e-6)


def _with_random_biases(base: Path, target: Path) -> Path:
    """transformers starts biases at zero, where they prove nothing."""
    model = tiny.load_model(base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)
    tiny.save_tokenizer(target)
    return target


def test_restoring_rope_on_all_dims(base_model: Path, tmp_path: Path) -> None:
    """At full rank only RoPE was dropped, and decompress puts it back: mean rotations are undone, too."""
    compress(base_model, tmp_path / "out", f"rope_dim: 32, kv_lora_rank: {2 * KEYS - 32}, freqfold: 1")
    assert (logits(tmp_path / "out") - logits(base_model)).abs().max() > 0.1
    decompress(tmp_path / "out", tmp_path / "plain", lambda *_: None)
    assert (logits(tmp_path / "plain") - logits(base_model)).abs().max() < 1e-4


def test_compressed_checkpoint(converted: Path, base_model: Path) -> None:
    assert verify(converted).ok
    plan = planning.make(Checkpoint.open(base_model), recipe(AUTO), str(base_model))
    manifest = Manifest.load(converted)
    width = int(2 * KEYS / 1.6)
    assert plan.bytes_per_token == manifest.bytes_per_token.compressed == tiny.NUM_LAYERS * width * 2
    assert plan.compressed_weights_bytes == manifest.weights_bytes.compressed
    assert plan.ratio == manifest.bytes_per_token.ratio == 1.6
    config = json.loads((converted / "config.json").read_text())
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == width
    assert config["architectures"] == ["KVCompressMLAForCausalLM"]
    reason = plan.to_json()["layers"][0]["reason"]
    assert f"latent attention: {width} channels" in reason


def test_cache_holds_one_vector_per_token(converted: Path) -> None:
    model, cache = tiny.load_model(converted), CompressedCache.from_pretrained(converted)
    tokens = torch.tensor(tiny.prompts([50]))
    with torch.no_grad():
        whole = model(tokens).logits
        model(tokens[:, :20], past_key_values=cache)
        rest = model(tokens[:, 20:], past_key_values=cache).logits
    # The manifest counts 16 bits a number, as vLLM serves; here the model runs in float32.
    assert cache.nbytes == 2 * 50 * Manifest.load(converted).bytes_per_token.compressed
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-4)


def test_eager_and_sdpa_agree(converted: Path) -> None:
    model, tokens = tiny.load_model(converted), torch.tensor(tiny.prompts([40]))
    with torch.no_grad():
        sdpa = model(tokens).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(tokens).logits, sdpa, rtol=1e-4, atol=1e-4)


def test_same_inputs_same_bytes_and_resume(converted: Path, base_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stops = [("choosing RoPE dims", 2), ("converting layers", 1), ("converting layers", 3), ("writing weights", 1)]
    for step, count in stops:

        def interrupt(now: str, done: int, total: int, step: str = step, count: int = count) -> None:
            if now == step and done >= count and done < total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(base_model, out, AUTO, interrupt, resume=True)
    compress(base_model, out, AUTO, resume=True)
    assert tree_sha256(out) == tree_sha256(converted)


def test_query_rank(base_model: Path, tmp_path: Path) -> None:
    full = tiny.NUM_HEADS * tiny.HEAD_DIM
    compress(base_model, tmp_path / "full", f"{FULL}, q_lora_rank: {full}")
    assert (logits(tmp_path / "full") - logits(base_model)).abs().max() < 1e-4
    compress(base_model, tmp_path / "low", f"{FULL}, q_lora_rank: {full // 2}")
    assert Checkpoint.open(tmp_path / "low").tensors["model.layers.0.self_attn.q_a_proj.weight"].shape[0] == full // 2
    assert (logits(tmp_path / "low") - logits(base_model)).abs().max() > 1e-2
    decompress(tmp_path / "full", tmp_path / "plain", lambda *_: None)
    assert (logits(tmp_path / "plain") - logits(base_model)).abs().max() < 1e-4


# The linear algebra by itself


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated keys and values before RoPE `[tokens, 2 * KEYS]`, their second moment, and queries per KV head."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2 * KEYS, 2 * KEYS, generator=generator, dtype=torch.float64)
    z_TZ = torch.randn(3000, 2 * KEYS, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 2 * KEYS)
    z_TZ = z_TZ @ mixing + 0.3
    query = torch.randn(3000, tiny.NUM_KV_HEADS, tiny.HEAD_DIM, generator=generator, dtype=torch.float64)
    return z_TZ, z_TZ.mT @ z_TZ / len(z_TZ), query


def sizes(rope_dim: int, rank: int) -> rorope.Sizes:
    return rorope.Sizes(tiny.NUM_KV_HEADS, tiny.HEAD_DIM, rope_dim, rank)


THETA = transmla.frequencies({}, tiny.HEAD_DIM)


def turn(x_TN: torch.Tensor, angle_TF: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + N/2)."""
    real, imaginary = x_TN.chunk(2, -1)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angle_TF)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("unitary", [True, False])
@pytest.mark.parametrize("fold", [1, 4])
def test_rotation_is_orthogonal_and_concentrates_energy(sample: Any, unitary: bool, fold: int) -> None:
    _, second, _ = sample
    keys = second[:KEYS, :KEYS]
    map_KK = rorope.rotation(second, sizes(32, 48), fold, unitary)
    torch.testing.assert_close(map_KK.mT @ map_KK, torch.eye(KEYS, dtype=torch.float64))
    energy = (map_KK.mT @ keys @ map_KK).diagonal()
    # The best subspace of each group: its eigenvalues, each shared by the two channels of a pair.
    best = 0.0
    half = tiny.HEAD_DIM // 2
    for group in range(half // fold):
        real = (torch.arange(tiny.NUM_KV_HEADS)[:, None] * tiny.HEAD_DIM + group * fold + torch.arange(fold)).flatten()
        pair = keys[real][:, real] + keys[real + half][:, real + half]
        if unitary:
            pair = pair + 1j * (keys[real + half][:, real] - keys[real][:, real + half])
        best += float(torch.linalg.eigvalsh(pair).flip(0)[: 16 * fold // half].sum())
    assert float(energy[:32].sum()) == pytest.approx(best)
    assert float(energy[:32].sum()) > 1.05 * float(keys.diagonal().sum()) * 32 / KEYS


@pytest.mark.parametrize("unitary", [True, False])
def test_scores_keep_rope_exactly_without_folding(sample: Any, unitary: bool) -> None:
    z_TZ, second, query = sample
    map_KK = rorope.rotation(second, sizes(KEYS, KEYS), 1, unitary)
    frequencies = transmla.kept_frequencies(THETA, KEYS, tiny.HEAD_DIM, 1)
    theta_F, kept_F = torch.tensor(THETA).double(), torch.tensor(frequencies).double()
    position = torch.arange(3000, dtype=torch.float64)[:, None]
    for head in range(tiny.NUM_KV_HEADS):
        part = slice(head * tiny.HEAD_DIM, (head + 1) * tiny.HEAD_DIM)
        exact = turn(query[:, head], position * theta_F) @ turn(z_TZ[:, part], position * theta_F)[7]
        mixed_query, mixed_key = query[:, head] @ map_KK[part], z_TZ[:, :KEYS] @ map_KK
        found = turn(mixed_query, position * kept_F) @ turn(mixed_key, position * kept_F)[7]
        torch.testing.assert_close(found, exact)


def test_dropped_rope_is_no_rotation_or_its_mean(sample: Any) -> None:
    """At full rank the score of what lost RoPE is q . k, or q . (E[rotation] k), whatever the distance."""
    z_TZ, second, query = sample
    full = sizes(32, 2 * KEYS - 32)
    map_KK = rorope.rotation(second, full, 1, True)
    rest = map_KK[:, 32:] @ map_KK[:, 32:].mT
    mean_F = rorope.mean_rotation(torch.tensor(THETA), 512)
    for mean in (None, mean_F):
        made = rorope.latent(second, second, map_KK, full, 1.0, mean)
        latent_TR = (z_TZ @ made.down_CZ.mT)[:, : full.rank]
        key_TK = z_TZ[:, :KEYS] @ rest
        for head in range(tiny.NUM_KV_HEADS):
            key_TD = key_TK[:, head * tiny.HEAD_DIM : (head + 1) * tiny.HEAD_DIM]
            if mean is not None:
                real, imaginary = (torch.complex(*key_TD.chunk(2, -1)) * mean).real, None
                imaginary = (torch.complex(*key_TD.chunk(2, -1)) * mean).imag
                key_TD = torch.cat([real, imaginary], -1)
            found = (query[:, head] @ made.k_up_HDC[head, :, : full.rank] * latent_TR).sum(-1)
            torch.testing.assert_close(found, (query[:, head] * key_TD).sum(-1))
            value = latent_TR @ made.v_up_HDR[head].mT
            part = slice(KEYS + head * tiny.HEAD_DIM, KEYS + (head + 1) * tiny.HEAD_DIM)
            torch.testing.assert_close(value, z_TZ[:, part])


def test_mean_rotation_is_the_mean() -> None:
    theta, weights = torch.tensor([1.0, 0.01, 0.0]), 1 / torch.arange(1, 301, dtype=torch.float64)
    expected = [sum(w * torch.exp(-1j * t * n) for n, w in enumerate(weights)) / weights.sum() for t in theta.double()]
    torch.testing.assert_close(rorope.mean_rotation(theta, 300), torch.stack(expected).to(torch.complex128))


def test_low_rank_reaches_the_optimum(sample: Any) -> None:
    """Error of balanced keys and values = the eigenvalues left out, the least any latent of that rank can have."""
    z_TZ, second, _ = sample
    small = sizes(32, 24)
    map_KK = rorope.rotation(second, small, 1, True)
    made = rorope.latent(second, second, map_KK, small, 1.0, None)
    rest = map_KK[:, 32:]
    key, value = z_TZ[:, :KEYS] @ rest, z_TZ[:, KEYS:]
    ratio = key.square().mean(0).sqrt().mean() / value.square().mean(0).sqrt().mean()
    balanced = torch.cat([key / ratio, value], 1)
    latent_TR = (z_TZ @ made.down_CZ.mT)[:, :24]
    found_key = latent_TR @ made.k_up_HDC[..., :24].flatten(0, 1).mT @ rest / ratio
    found = torch.cat([found_key, latent_TR @ made.v_up_HDR.flatten(0, 1).mT], 1)
    optimum = torch.linalg.svdvals(balanced)[24:].square().sum()
    torch.testing.assert_close((balanced - found).square().sum(), optimum, rtol=1e-6, atol=0.0)


def test_activation_whitening_beats_the_weights_own_axes(sample: Any) -> None:
    z_TZ, second, _ = sample
    small = sizes(32, 24)
    map_KK = rorope.rotation(second, small, 1, True)
    errors = []
    for metric in (second, torch.eye(2 * KEYS, dtype=torch.float64)):
        made = rorope.latent(second, metric, map_KK, small, 1.0, None)
        value = (z_TZ @ made.down_CZ.mT)[:, :24] @ made.v_up_HDR.flatten(0, 1).mT
        errors.append(float((value - z_TZ[:, KEYS:]).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_folded_frequencies() -> None:
    theta = [8.0, 4.0, 2.0, 1.0]
    assert transmla.kept_frequencies(theta, 8, 8, 1) == theta
    assert transmla.kept_frequencies(theta, 16, 8, 1) == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0]
    assert transmla.kept_frequencies(theta, 8, 8, 2) == theta
    assert transmla.kept_frequencies(theta, 4, 8, 2) == [8.0, 2.0]
    assert transmla.kept_frequencies(theta, 4, 8, 4) == [8.0, 2.0]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_frequencies_are_transformers_own(scaling: dict[str, Any]) -> None:
    parameters = scaling | {"rope_theta": 5e5}
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=2048, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(torch.tensor(transmla.frequencies({"rope_parameters": parameters}, 64)), expected)
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    torch.testing.assert_close(torch.tensor(transmla.frequencies(old, 64)), expected)


@pytest.mark.parametrize(
    ("architecture", "config", "stage", "words"),
    [
        ("Qwen3", {}, FULL, "line 3: Qwen3ForCausalLM normalises queries and keys"),
        ("Mistral", {"sliding_window": 64}, FULL, "sliding window of 64 tokens"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            FULL,
            "RoPE is 'dynamic'.*one frequency per pair",
        ),
        ("Llama", {}, "rope_dim: 72, kv_lora_rank: 32", "has 64 key and 64 value channels"),
        ("Llama", {}, "rope_dim: 32, kv_lora_rank: 104", "has 64 key and 64 value channels"),
        ("Llama", {}, "rope_dim: 16, kv_lora_rank: 32, freqfold: 1", "must be a multiple of head_dim 32"),
        ("Llama", {}, "kv_lora_rank: 64", "rope_dim auto needs kv_lora_rank auto"),
    ],
)
def test_refusals(architecture: str, config: dict[str, Any], stage: str, words: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path, architecture, **config)
    with pytest.raises(ValueError, match=words):
        planning.make(Checkpoint.open(base), recipe(stage), str(base))


def test_codec_on_the_latent_is_refused(base_model: Path) -> None:
    both = recipe(FULL, "  - {method: scalar, bits: 8}\n")
    with pytest.raises(ValueError, match=r"line 4: scalar stores keys and values apart.*use transmla alone"):
        planning.make(Checkpoint.open(base_model), both, str(base_model))
