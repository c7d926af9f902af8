"""The transformers engine against plain forward passes, and the URL engine against a server in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvcompress_eval.engines import Engine, open_engine
from kvcompress_eval.engines import transformers_engine as module
from kvcompress_eval.engines.base import contains_all
from kvcompress_eval.models import describe_models
from kvcompress_eval.tokenizer import TextTokenizer

from kvcompress.serving.transformers import CompressedCache
from tests import tiny

TOKENS = torch.randint(2, 1024, (200,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> TextTokenizer:
    return TextTokenizer(base)


def engine_on(folder: Path, tokenizer: TextTokenizer) -> Engine:
    return open_engine("transformers", folder, tokenizer, max_context=512)


def test_scores_equal_a_plain_forward_pass(
    base: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(base, tokenizer)
    with torch.no_grad():
        logits = tiny.load_model(base)(torch.tensor([TOKENS])).logits[0]
    expected = logits[:-1].log_softmax(-1)
    for chunk in (4096, 64):
        monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
        scores = engine.score(TOKENS, distribution=True)
        assert scores.distribution_TV is not None
        np.testing.assert_allclose(scores.distribution_TV, expected.numpy(), atol=2e-4)
        picked = expected[torch.arange(199), torch.tensor(TOKENS[1:])]
        np.testing.assert_allclose(scores.log_probs_T, picked.numpy(), atol=2e-4)
        assert scores.top1_T.tolist() == expected.argmax(-1).tolist()
    assert engine.score(TOKENS).distribution_TV is None


def test_next_log_probs_are_those_of_the_last_token(base: Path, tokenizer: TextTokenizer) -> None:
    with torch.no_grad():
        expected_V = tiny.load_model(base)(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    engine = module.TransformersEngine(base, tokenizer)
    found_V = engine.next_log_probs(TOKENS[:-3], TOKENS[-3:])
    np.testing.assert_allclose(found_V, expected_V.numpy(), atol=2e-4)
    for error in (1e-3, 1e-2):
        disturbed = []
        for seed in (1, 1, 2):
            with engine.disturbed(error, seed):
                disturbed.append(engine.next_log_probs(TOKENS[:-3], TOKENS[-3:]) - found_V)
        np.testing.assert_array_equal(disturbed[0], disturbed[1])
        assert np.abs(disturbed[0] - disturbed[2]).max() > error / 100
        for change_V in disturbed:
            assert error / 100 < np.abs(change_V).mean() < error * 10
    np.testing.assert_array_equal(engine.next_log_probs(TOKENS[:-3], TOKENS[-3:]), found_V)


def test_generation_equals_generate(base: Path, tokenizer: TextTokenizer) -> None:
    engine = engine_on(base, tokenizer)
    model = tiny.load_model(base)
    for start in (0, 50, 120):
        prompt = TOKENS[start : start + 40]
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, 40:].tolist()
        expected = expected[: expected.index(1)] if 1 in expected else expected
        [found] = engine.generate([prompt], 24)
        assert list(found.tokens) == expected
        assert found.text == tokenizer.decode(expected)


def test_the_end_token_stops_and_is_left_out(base: Path, tokenizer: TextTokenizer) -> None:
    engine = engine_on(base, tokenizer)
    [free] = engine.generate([TOKENS[:40]], 8)
    engine._ends = {free.tokens[3]}  # type: ignore[attr-defined]
    [stopped] = engine.generate([TOKENS[:40]], 8)
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[3])]
    [through] = engine.generate([TOKENS[:40]], 8, ignore_end=True)
    assert len(through.tokens) == 8
    assert through.tokens[: len(free.tokens)] == free.tokens


def test_generation_may_end_once_all_texts_are_found(base: Path, tokenizer: TextTokenizer) -> None:
    engine = engine_on(base, tokenizer)
    [free] = engine.generate([TOKENS[:40]], 16)
    wanted = tokenizer.decode(free.tokens[:5]).upper()
    [early] = engine.generate([TOKENS[:40]], 16, [[wanted]])
    assert early.tokens == free.tokens[: len(early.tokens)]
    assert len(early.tokens) < 16
    assert contains_all(early.text, [wanted])
    [never] = engine.generate([TOKENS[:40]], 16, [["not in any text 123"]])
    assert never == free


def test_compressed_scores_see_every_token_as_stored(compressed: Path, base: Path, tokenizer: TextTokenizer) -> None:
    tokens = TOKENS[:80]
    scores = engine_on(compressed, tokenizer).score(tokens, distribution=True)
    assert scores.distribution_TV is not None
    model = tiny.load_model(compressed)
    cache = CompressedCache.from_pretrained(compressed)
    with torch.no_grad():
        one_by_one = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in tokens[:-1]]
    expected = torch.stack(one_by_one).log_softmax(-1)
    np.testing.assert_allclose(scores.distribution_TV, expected.numpy(), atol=2e-3)
    plain = engine_on(base, tokenizer).score(tokens, distribution=True)
    assert plain.distribution_TV is not None
    assert np.abs(plain.distribution_TV - scores.distribution_TV).max() > 0.01, "compression must show"


@pytest.mark.parametrize("less", [{"kv_rank": 0.5}, {"kv_bits": 2}], ids=str)
def test_less_of_the_codec_is_what_the_cache_gives(
    compressed: Path, base: Path, tokenizer: TextTokenizer, less: dict[str, Any]
) -> None:
    engine = open_engine("transformers", compressed, tokenizer, max_context=512, **less)
    cache = CompressedCache.from_pretrained(compressed, **less)
    with torch.no_grad():
        logits = tiny.load_model(compressed)(torch.tensor([TOKENS[:-1]]), past_key_values=cache).logits[0]
    scores = engine.score(TOKENS, distribution=True)
    assert scores.distribution_TV is not None
    np.testing.assert_allclose(scores.distribution_TV, logits.log_softmax(-1).numpy(), atol=2e-4)
    whole = engine_on(compressed, tokenizer).score(TOKENS, distribution=True).distribution_TV
    assert np.abs(scores.distribution_TV - whole).max() > 0.01
    full, part = (describe_models([compressed], base, **given)[1].bytes_per_token for given in ({}, less))
    assert part == sum(layer.codec.spec.bytes_per_token for layer in cache.layers)
    assert full is not None
    assert part < 0.9 * full


def test_sequences_do_not_leak_into_each_other(compressed: Path, tokenizer: TextTokenizer) -> None:
    engine = engine_on(compressed, tokenizer)
    first = engine.generate([TOKENS[:40]], 8)
    engine.score(TOKENS)
    assert engine.generate([TOKENS[60:90], TOKENS[:40]], 8)[1:] == first


def test_unknown_engine_is_refused(base: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="unknown engine 'triton'; expected auto, transformers, vllm"):
        open_engine("triton", base, tokenizer, max_context=64)


class Server(BaseHTTPRequestHandler):
    """Continues by counting on from the last token; gives prompt log probabilities as vLLM does."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        if body["model"] != "tiny" or body["temperature"] != 0.0:
            self.send_error(400)
            return
        made = [prompt[-1] + at + 1 for at in range(body["max_tokens"])]
        choice: dict[str, Any] = {"text": " ".join(map(str, made)), "token_ids": made}
        if "prompt_logprobs" in body:
            best = {"7": {"logprob": -0.5, "rank": 1}}
            rows = [{str(token): {"logprob": -2.0, "rank": 2}, **best} for token in prompt[1:]]
            choice["prompt_logprobs"] = [None, *rows]
        self._answer({"choices": [choice]})

    def _answer(self, content: Any) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_url_engine(url: str, base: Path, tokenizer: TextTokenizer) -> None:
    engine = open_engine(url, base, tokenizer, max_context=64)
    made = engine.generate([[5, 6], [20]], 3)
    assert [item.tokens for item in made] == [(7, 8, 9), (21, 22, 23)]
    assert made[0].text == "7 8 9"
    scores = engine.score([4, 5, 6])
    assert scores.log_probs_T.tolist() == [-2.0, -2.0]
    assert scores.top1_T.tolist() == [7, 7]
    with pytest.raises(ValueError, match="whole distributions"):
        engine.score([4, 5], distribution=True)
    engine.close()


def test_url_engine_names_what_is_wrong(url: str, base: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="the server answered 400"):
        open_engine(url, base, tokenizer, max_context=64, served_model="other").generate([[1]], 1)
    with pytest.raises(ValueError, match="does not answer"):
        open_engine("http://127.0.0.1:9", base, tokenizer, max_context=64)
