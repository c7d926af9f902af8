"""One column of the matrix: a compressed tiny model and the engines that its tests look at, each started once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcompress.serving.loading import KV_BITS, KV_RANK
from tests import tiny
from tests.e2e import adapter, http_server, reference, vllm_engine
from tests.e2e.support_matrix import bench, pressed
from tests.e2e.support_matrix.methods import METHODS, WINDOW

LENGTHS, TOKENS = [1, 17, 33, 64, 70, 130], 72
FEW, SHORT = 2, 12
"""Prompts and tokens where it is not the number that matters."""

BLOCK = vllm_engine.ENGINE["block_size"]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ELASTIC: dict[str, dict[str, Any]] = {"elastic_rank": {"kv_rank": 0.5}, "elastic_bits": {"kv_bits": 4}}
"""How much less than the checkpoint holds, by feature."""


class Case:
    """The tests of one method share an object, so engines start when the first test asks."""

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.name, self.method, self.folder = name, METHODS[name], folder
        self.model = self.method.compress(base, folder / "model")

    @cached_property
    def expected(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and the greedy tokens of the transformers path."""
        return reference.greedy(self.model, LENGTHS, TOKENS)

    @cached_property
    def pressed(self) -> dict[str, Any]:
        engine = vllm_engine.ENGINE | {
            "model": str(self.model),
            "skip_tokenizer_init": False,
            "max_num_batched_tokens": 24,
            "num_gpu_blocks_override": self.method.pool,
            "speculative_config": NGRAM,
        }
        prompts, tokens = self.expected
        found = vllm_engine.in_child(pressed.run, engine=engine, prompts=prompts, tokens=TOKENS)
        assert found["tokens"] == [tokens] * 2
        return found

    def score(self, answers: list[list[int]]) -> list[float]:
        """The transformers path's log-probabilities of answers to the prompt that is sampled from."""
        return reference.score(self.model, self.expected[0][-1], answers)

    @cached_property
    def server(self) -> dict[str, Any]:
        """A compiled server, on two ranks where the method has them: its answers, a benchmark of it, and its log."""
        prompts, _ = self.expected
        log = self.folder / "server.log"
        with self._server(log) as url:
            answers = [http_server.complete(url, "tiny", prompt, SHORT) for prompt in prompts[-FEW:]]
            measured = vllm_engine.in_child(
                bench.run, url=url, model="tiny", tokenizer=str(self.model), folder=str(self.folder)
            )
        return {
            "tokens": [answer["choices"][0]["token_ids"] for answer in answers],
            "texts": [answer["choices"][0]["text"] for answer in answers],
            "bench": measured,
            "log": log.read_text(),
        }

    @contextmanager
    def _server(self, log: Path) -> Iterator[str]:
        options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "320"]
        options += ["--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(64 * 2**20)]
        if "tensor_parallel" not in self.method.refused:
            options += ["--tensor-parallel-size", "2"]
        # The graphs of all methods are nearly the same: what the compiler has cached for one serves the next.
        cache = self.folder.parent / "compiled"
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(cache)}
        with http_server.forked(self.model, log, *options, env=environment) as url:
            yield url

    @cached_property
    def windowed(self) -> tuple[dict[str, Any], list[list[int]]]:
        """A model with a sliding-window layer, served, and the transformers path's tokens."""
        model = self.windowed_model()
        prompts, expected = reference.greedy(model, LENGTHS[-FEW:], SHORT)
        return vllm_engine.run(model, prompts, prompts, max_tokens=SHORT, max_num_batched_tokens=24), expected

    def windowed_model(self) -> Path:
        base = tiny.save_model(self.folder / "windowed-base", vocab_size=300, **WINDOW)
        tiny.save_tokenizer(base)
        return self.method.compress(base, self.folder / "windowed")

    def smaller(self, feature: str) -> tuple[dict[str, Any], list[list[int]]]:
        """The model with less of its codec, served, and the transformers path's tokens."""
        prompts, expected = reference.greedy(self.model, LENGTHS[-FEW:], SHORT, **ELASTIC[feature])
        return vllm_engine.run(self.model, prompts, prompts, max_tokens=SHORT, env=_environment(feature)), expected

    def adapted(self) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Served without a LoRA adapter and with one, in one engine, and the transformers path's tokens likewise."""
        lora = adapter.save(tiny.load_model(self.model), self.folder / "lora")
        expected = [reference.greedy(self.model, LENGTHS[-FEW:], SHORT, lora=given) for given in (None, lora)]
        options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "additional_config": {"adapter": str(lora)}}
        passes = [prompts for prompts, _ in expected]
        served = vllm_engine.run(self.model, *passes, max_tokens=SHORT, serve=adapter.serve, **options)
        return served["tokens"], [tokens for _, tokens in expected]

    def refusal(self, feature: str) -> str:
        """What is printed when a feature is asked for."""
        asked: dict[str, Any] = {"model": str(self.model)}
        if feature == "sliding_window":
            try:
                asked = {"model": str(self.windowed_model())}
            except ValueError as error:  # `compress` itself refuses
                return str(error)
        asked |= {"tensor_parallel": {"tensor_parallel_size": 2}, "sleep": {"enable_sleep_mode": True}}.get(feature, {})
        attempt = vllm_engine.in_child(
            vllm_engine.attempts, _environment(feature), engines=[vllm_engine.ENGINE | asked]
        )
        (message,) = attempt["errors"]
        assert message != "started"
        # With several ranks the workers say why, and the front end only that they stopped.
        text: str = message + "\n" + attempt["log"]
        return text


def _environment(feature: str) -> dict[str, str]:
    """What tells the server of the smaller codec."""
    names = {"kv_rank": KV_RANK, "kv_bits": KV_BITS}
    return {names[name]: str(value) for name, value in ELASTIC.get(feature, {}).items()}
