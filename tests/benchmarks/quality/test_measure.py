"""Simulated caches under a model, and what is measured of them."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kvcompress_eval.tokenizer import TextTokenizer
from quality.caches import peer_cache
from quality.clock import Clock
from quality.kivi import kivi
from quality.measure import Candidate, Scores, compare, log_probabilities, score, summary
from quality.oscar import fit, oscar
from quality.peer import Peer
from quality.roster import LABELS, PEERS
from quality.rows import peer_bytes
from quality.windows import Plan, Window, read_text, spread, text_files
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvcompress.codec.spec import CodecSpec
from tests import tiny

ROOT = Path(__file__).resolve().parents[3]
WINDOW = Window("random", tuple(tiny.prompts([150])[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny.save_model(tmp_path_factory.mktemp("base"), num_hidden_layers=2, vocab_size=320)
    tiny.save_tokenizer(base)
    return base


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return tiny.load_model(folder)


@pytest.fixture(scope="module")
def precise(folder: Path) -> Any:
    """In float64, where no rounding of the model's own moves a value to another code."""
    return tiny.load_model(folder).double()


def candidate(model: Any, peer: Peer) -> Candidate:
    return Candidate(model, partial(peer_cache, peer, model.config), peer.views)


def exact(states: Tensor, side: str, layer: int) -> Tensor:
    return states


def test_a_cache_that_changes_nothing_has_no_divergence(model: Any) -> None:
    [[found]] = score(model, [candidate(model, Peer(exact, lambda head_dim, length: 16))], [WINDOW])
    assert found.kl_T.max() < 1e-6
    assert bool(found.same_T.all())
    torch.testing.assert_close(found.nll_T, found.base_nll_T)
    assert found.base_nll_T.mean() > 1


def by_steps(model: Any, peer: Peer, keys_exact: Any, values_exact: Any) -> Tensor:
    """The definition: token by token, each step's cache put together from what is exact and what is stored by then."""
    original = DynamicCache(config=model.config)
    parts = []
    for position, token in enumerate(WINDOW.tokens):
        held = Step(original, peer, position, keys_exact, values_exact)
        with torch.no_grad():
            logits = model(torch.tensor([[token]]), past_key_values=held, use_cache=True).logits[0]
        parts.append(logits.log_softmax(-1))
    return torch.cat(parts)


class Step(DynamicCache):
    """What one step sees; appends to the cache of exact states."""

    def __init__(self, original: DynamicCache, peer: Peer, position: int, keys_exact: Any, values_exact: Any) -> None:
        super().__init__()
        self.original, self.peer, self.position = original, peer, position
        self.rules = {"k": keys_exact, "v": values_exact}

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.position

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        whole = self.original.update(keys, values, layer_idx)
        seen = []
        for side, states in zip(("k", "v"), whole, strict=True):
            stored = self.peer.stored(states, side, layer_idx)  # type: ignore[arg-type]
            tokens = [
                (states if self.rules[side](self.position, token) else stored)[..., token, :]
                for token in range(self.position + 1)
            ]
            seen.append(torch.stack(tokens, dim=-2))
        return tuple(seen)


def test_kivi_in_one_pass_is_kivi_step_by_step(precise: Any) -> None:
    group, residual = 16, 32
    peer = kivi(2, group, residual)
    slow = by_steps(
        precise,
        peer,
        keys_exact=lambda now, token: token >= now - now % residual,
        values_exact=lambda now, token: now - token <= residual,
    )
    fast = log_probabilities(candidate(precise, peer), WINDOW)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0, check_dtype=False)
    base = log_probabilities(Candidate(precise, lambda: None), WINDOW)
    first_stored = residual  # the first query that meets a stored key
    torch.testing.assert_close(fast[:first_stored], base[:first_stored], atol=1e-5, rtol=0)
    assert (fast[residual + 1 :] - base[residual + 1 :]).abs().amax(1).min() > 1e-3


def test_oscar_in_one_pass_is_oscar_step_by_step(precise: Any) -> None:
    rotations = fit(precise, tiny.prompts([64, 64], seed=5))
    assert sorted(rotations["k"]) == [0, 1]
    sink, recent = 4, 20
    peer = oscar(rotations, 2, sink, recent)

    def is_exact(now: int, token: int) -> bool:
        return token < sink or now - token < recent

    slow = by_steps(precise, peer, is_exact, is_exact)
    fast = log_probabilities(candidate(precise, peer), WINDOW)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0, check_dtype=False)
    base = log_probabilities(Candidate(precise, lambda: None), WINDOW)
    torch.testing.assert_close(fast[: sink + recent], base[: sink + recent], atol=1e-5, rtol=0)


def test_layers_with_a_window_keep_an_ordinary_cache(tmp_path: Path) -> None:
    base = tiny.save_model(
        tmp_path / "base",
        "Qwen2",
        num_hidden_layers=2,
        sliding_window=32,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention"],
    )
    model = tiny.load_model(base)
    for peer in (kivi(2, 16, 32), Peer(exact, lambda head_dim, length: 4)):
        cache = peer_cache(peer, model.config)
        assert not hasattr(cache.layers[1], "peer")
        log_probabilities(candidate(model, peer), WINDOW)
    config = json.loads((base / "config.json").read_text())
    layer = 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 2
    assert peer_bytes(Peer(exact, lambda head_dim, length: 4), config, 64) == layer / 4 + layer


def test_every_peer_runs_and_is_named(model: Any, folder: Path) -> None:
    assert list(LABELS) == list(PEERS)
    divergence = {}
    for name, make in PEERS.items():
        peer = make(model, lambda: [Window("calibration", tuple(tiny.prompts([100], seed=3)[0]))])
        [[found]] = score(model, [candidate(model, peer)], [WINDOW])
        divergence[name] = summary([found])["kl"]
        assert 2 < peer.bits(64, 100_000) < 9
    assert divergence["q8_0-hadamard"] < divergence["int4-hadamard"] < divergence["turboquant-2"]
    assert divergence["turboquant-4"] < divergence["turboquant-3"] < divergence["turboquant-2"]
    head = json.loads((folder / "config.json").read_text())
    full = 2 * 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 2
    expected = full * (4 + 16 / tiny.HEAD_DIM) / 16
    assert peer_bytes(PEERS["int4-hadamard"](model, list), head, 1024) == pytest.approx(expected)


def test_divergence_by_the_letter() -> None:
    generator = torch.Generator().manual_seed(0)
    base, ours = (torch.randn(5, 7, generator=generator).log_softmax(-1) for _ in range(2))
    found = compare(base, ours, Window("any", (0, 3, 1, 6, 2)))
    for token in range(5):
        terms = [math.exp(base[token, v]) * float(base[token, v] - ours[token, v]) for v in range(7)]
        assert float(found.kl_T[token]) == pytest.approx(sum(terms), rel=1e-4)
        assert bool(found.same_T[token]) == (int(base[token].argmax()) == int(ours[token].argmax()))
    assert found.nll_T.tolist() == pytest.approx([-float(ours[at, token]) for at, token in enumerate((3, 1, 6, 2))])


def test_quarters_are_those_of_each_window() -> None:
    def scores(values: list[float]) -> Scores:
        tokens = len(values)
        nll = torch.full((tokens - 1,), math.log(4.0))
        return Scores(torch.tensor(values), torch.arange(tokens) % 2 == 0, nll, nll + math.log(2.0))

    found = summary([scores([1, 1, 2, 2, 3, 3, 4, 4]), scores([5, 5, 6, 6, 7, 7, 8, 8])])
    assert found["kl_quarters"] == [3, 4, 5, 6]
    assert found["kl"] == 4.5
    assert found["same_top"] == 50
    assert found["perplexity"] == pytest.approx(4)
    assert found["base_perplexity"] == pytest.approx(8)


def test_windows_are_spread_over_a_text(folder: Path, tmp_path: Path) -> None:
    assert spread(100, 1) == [50]
    assert spread(100, 2) == [25, 75]
    text = tmp_path / "prose.txt"
    text.write_text("the cat sat on the mat and the rat ran. " * 100)
    tokenizer = TextTokenizer(folder)
    windows = Plan.parse("16:3").windows([text], tokenizer)
    assert [len(window.tokens) for window in windows] == [16, 16, 16]
    assert {window.kind for window in windows} == {"prose"}
    tokens = tokenizer.encode(text.read_text(), special=False)
    size = 16 - len(tokenizer.prefix)
    start = (len(tokens) - size) // 2
    [middle] = Plan.parse("16:1:prose").windows([text], tokenizer)
    assert middle.tokens[len(tokenizer.prefix) :] == tuple(tokens[start : start + size])


def test_conversations_are_read_in_the_chat_template(folder: Path, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]}
    (tmp_path / "dialogue.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    tokenizer = TextTokenizer(folder)
    [file] = text_files([tmp_path])
    assert read_text(file, tokenizer) == "User: the cat\nAssistant: sat on the mat\n" * 3  # no template here
    with_template = tmp_path / "model"
    shutil.copytree(folder, with_template)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (with_template / "chat_template.jinja").write_text(template)
    assert read_text(file, TextTokenizer(with_template)) == "<user>the cat<assistant>sat on the mat" * 3
    (tmp_path / "dialogue.jsonl").write_text('{"text": "no conversation"}\n')
    with pytest.raises(ValueError, match="line 1 is no conversation"):
        read_text(file, tokenizer)


@pytest.mark.parametrize(
    ("words", "message"),
    [("1024", "expected TOKENS:COUNT"), ("x:1", "expected TOKENS:COUNT"), ("16:1:poems", "no text of kind poems")],
)
def test_wrong_windows_are_one_sentence(words: str, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("the cat sat " * 50)
    with pytest.raises(ValueError, match=message):
        Plan.parse(words).windows(text_files([tmp_path]), TextTokenizer(folder))


def test_time_left_goes_by_what_a_row_took() -> None:
    clock = Clock()
    assert clock.left([("slow", 100)]) == 0
    clock.add("slow", 100, 50.0)
    clock.add("fast", 300, 10.0)
    assert clock.left([("slow", 200), ("fast", 30), ("new", 20)]) == pytest.approx(100 + 1 + 20 * 60 / 400)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs benchmarks/peers.py in this process, as the script it is."""

    def command(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, words)])
        runpy.run_path(str(ROOT / "benchmarks" / "peers.py"), run_name="__main__")

    return command


def test_the_command_measures_checkpoints_and_peers_and_goes_on(
    run: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "texts"
    text.mkdir()
    for kind in ("prose", "verse"):
        (text / f"{kind}.txt").write_text(f"{kind}: the cat sat on the mat and the rat ran. " * 60)
    ours = tiny.save_compressed(folder, tmp_path / "mine", CodecSpec(tiny.uniform_spec(8).layers[:2]))
    words = (folder, "--work", tmp_path / "work", "--text", text, "--windows", "48:1", "96:1:verse")
    words = (*words, "--recipes", ours, "--peers", "int4-hadamard", "--out", tmp_path / "out.json")
    run(*words)
    assert capsys.readouterr().out.count("left") == 6
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["mine", LABELS["int4-hadamard"]]
    mine, peer = (row["lengths"] for row in results["rows"])
    assert set(mine) == {"48", "96"}
    assert set(mine["48"]["kl_by_kind"]) == {"prose", "verse"}
    assert set(mine["96"]["kl_by_kind"]) == {"verse"}
    assert mine["48"]["ratio"] == pytest.approx(2 * 32 / 34)  # 32 codes of a byte and a gain of 16 bits
    assert 0 < mine["48"]["kl"] < peer["48"]["kl"]
    run(*words, "--resume")
    assert "left" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == results


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipes", "no-such"), "no recipe no-such"),
        (("--peers", "int5"), "no peer int5"),
        (("--text", "no-such.txt"), "no text at no-such.txt"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: tuple[str, ...], message: str, run: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose.txt").write_text("the cat sat " * 50)
    given = [folder, "--work", tmp_path, "--text", tmp_path / "prose.txt", "--windows", "16:1", "--recipes", *words]
    with pytest.raises(SystemExit) as stopped:
        run(*given)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
