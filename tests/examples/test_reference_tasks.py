"""The bundled reference model's training data and loop: deterministic, aligned, resumable."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "reference_model"
sys.path.insert(0, str(SCRIPTS))

import mixture
import tasks
import train
import vocabulary
from llama import Llama, Shape, causal_attention
from ruler_prompts import NiahTask, VtTask, samples
from schedule import RUNS, Phase, Schedule, phase_at, rate_factor, schedule_for

TINY = Shape(vocab_size=0, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus of one page and a small tokenizer trained on it, in the layout of the real scripts."""
    corpus, tokenizer_dir = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("tokenizer")
    page = "The quick brown fox jumps over the lazy dog near the river bank.\n" * 80
    rows = [{"name": n, "kind": k, "text": page, "heldout": False} for n, k in (("a", "prose"), ("b", "code"))]
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = vocabulary.train(corpus, seed=0, vocab_size=1400, keys=2000)
    tokenizer.save(str(tokenizer_dir / "tokenizer.json"))
    (tokenizer_dir / "tokenizer_config.json").write_text("{}")
    vocabulary.encode_corpus(tokenizer, corpus)
    return corpus, tokenizer_dir


@pytest.fixture(scope="module")
def material(folders: tuple[Path, Path]) -> tasks.Material:
    """What the generators draw from."""
    return tasks.Material.load(folders[1], folders[0])


@pytest.mark.parametrize("name", mixture.NAMES)
def test_sequences_are_deterministic_and_aligned(material: tasks.Material, name: str) -> None:
    for length in (160, 900):
        first, second = (mixture.TASKS[name](material, random.Random(5), length) for _ in range(2))
        assert first == second
        if first is None:
            continue
        ids, weights = first
        assert len(ids) == len(weights) <= length
        assert ids[0] == tasks.BOS_ID
        assert weights[0] == 0.0
        assert any(w > 0 for w in weights)


def test_batches_follow_from_seed_and_step(material: tasks.Material) -> None:
    shares = dict.fromkeys(mixture.NAMES, 1.0)
    one, two, other = (mixture.make_batch(material, 3, step, 4, 300, shares) for step in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("name", ["single", "needles", "uuids", "tracking", "tracking_drill"])
def test_prompt_tokens_equal_those_of_the_whole_text(material: tasks.Material, name: str) -> None:
    """Prompts are put together from pieces; the benchmark tokenizes whole texts. Both must give the same tokens."""
    rng = random.Random(1)
    checked = 0
    for _ in range(40):
        made = mixture.TASKS[name](material, rng, 900)
        # A text haystack is cut at irregular places, where whole-text tokens differ.
        prompt = made and made[0][: next(i for i, w in enumerate(made[1]) if w > 0)]
        if not prompt or (name != "needles" and "There and back again" not in material.tokenizer.decode(prompt)):
            continue
        text = material.tokenizer.decode(prompt, skip_special_tokens=True)
        assert material.tokenizer.encode(text).ids == prompt
        checked += 1
    assert checked >= 5


def test_answers_hold_the_references(material: tasks.Material) -> None:
    """What is trained as the answer of a benchmark prompt holds the planted values."""
    for keys, values, queries in ((1, 1, 1), (1, 4, 1), (4, 1, 4)):
        made = tasks.niah(material, random.Random(2), 900, keys=keys, values=values, queries=queries)
        assert made is not None
        answer = material.tokenizer.decode([t for t, w in zip(*made, strict=True) if w > 0])
        context = material.tokenizer.decode([t for t, w in zip(*made, strict=True) if w == 0])
        planted = re.findall(r" is: (\d{7})\.", context)
        assert len(planted) == keys * values
        assert all(value in answer for value in planted)


def test_digit_groups_are_single_tokens(material: tasks.Material) -> None:
    for digits in (1, 2, 3):
        for number in range(10**digits):
            assert len(material.encode(f"{number:0{digits}d}")) == 1
    assert material.tokenizer.encode("a").ids[0] == tasks.BOS_ID


def test_scoring_prompts_fit(material: tasks.Material) -> None:
    def count(text: str) -> int:
        return len(material.encode(text))

    for task in (NiahTask(keys=4, queries=4), NiahTask(haystack="needle"), VtTask(hops=2)):
        drawn = samples(task, 1536, 3, count)
        assert drawn == samples(task, 1536, 3, count)
        for sample in drawn:
            assert count(sample.prompt) + task.generate <= 1536
            assert all(reference in sample.prompt for reference in sample.references)


def test_attention_equals_the_library() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(causal_attention(q, k, v, block=128), wanted, atol=1e-5, rtol=1e-4)


def test_training_model_equals_transformers(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    from export import export_model

    torch.manual_seed(0)
    shape = Shape(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    model = Llama(shape, torch.float32)
    for p in model.parameters():
        p.data = (torch.randn_like(p) * 0.2).bfloat16().float()
    export_model(model.state_dict(), shape, folders[1], tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40))
    where = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(model.logits_at(ids, where), loaded(ids).logits.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    corpus, tokenizer = folders
    vocabulary_size = tasks.Material.load(tokenizer, corpus).tokenizer.get_vocab_size()
    shape = Shape(**{**TINY.__dict__, "vocab_size": vocabulary_size})
    phases = [
        Phase(0, 64, 4, {"recall": 0.5, "repeats": 0.3, "text": 0.2}),
        Phase(12, 128, 2, {"single": 0.5, "recall": 0.5}),
    ]

    def weights(name: str, *parts: list[str]) -> dict:
        for extra in parts:
            common = ["--corpus", str(corpus), "--tokenizer", str(tokenizer), "--run", str(tmp_path / name)]
            train.run(train.parse([*common, "--workers", "0", *extra]), shape, Schedule(phases, 20))
        return torch.load(tmp_path / name / "state.pt", weights_only=True)

    straight = weights("straight", [])
    resumed = weights("resumed", ["--stop-at", "9"], ["--resume"])
    assert straight["step"] == resumed["step"] == 20
    assert straight["tokens"] == resumed["tokens"]
    for name, tensor in straight["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name


def test_schedule() -> None:
    phases = [Phase(0, 64, 4, {}), Phase(10, 128, 2, {})]
    assert [phase_at(s, phases).length for s in (0, 9, 10, 99)] == [64, 64, 128, 128]
    schedule = Schedule(phases, 10_000)
    assert rate_factor(0, schedule) < 0.1
    assert rate_factor(3_000, schedule) == 1.0
    assert rate_factor(9_999, schedule) == pytest.approx(0.02)
    finish = RUNS["finish"]
    assert rate_factor(finish.steps // 2, finish) == pytest.approx(finish.peak / 2)
    assert rate_factor(finish.steps, finish) == 0.0
    scratch = schedule_for("tasks", from_scratch=True)
    assert scratch.phases[0].start == 0
    assert scratch.steps > RUNS["tasks"].steps
