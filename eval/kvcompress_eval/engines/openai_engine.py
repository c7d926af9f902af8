"""Any server with an OpenAI-compatible completions endpoint, such as `kvcompress serve`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from kvcompress_eval.engines.base import Generation, Scores
from kvcompress_eval.tokenizer import TextTokenizer


class OpenAIEngine:
    """A running server, greedy.

    Args:
        url: base URL, with or without `/v1`.
        served_model: name the server gives the model; by default the only one it lists.
    """

    name = "openai"
    batch_size = 16
    vocabulary = None

    def __init__(
        self,
        url: str,
        tokenizer: TextTokenizer,
        *,
        served_model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1") + "/v1/"
        self._client = httpx.Client(base_url=base, headers=headers, timeout=timeout_s)
        self._tokenizer = tokenizer
        listed = [entry["id"] for entry in self._call("GET", "models")["data"]]
        if served_model is None and len(listed) != 1:
            raise ValueError(f"{url} serves {len(listed)} models ({', '.join(listed)}); name the one to evaluate")
        self._served_model = served_model or listed[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        # `until` only permits an early end; a server has no way to be told.
        with ThreadPoolExecutor(self.batch_size) as pool:
            waiting = [pool.submit(self._continue, prompt, max_tokens, ignore_end) for prompt in prompts]
            for count, _ in enumerate(as_completed(waiting), start=1):
                if answered is not None:
                    answered(count)
            return [each.result() for each in waiting]

    def _continue(self, prompt: Sequence[int], max_tokens: int, ignore_end: bool) -> Generation:
        # ignore_eos is vLLM's; a server without it may refuse the field, so it is sent only where it matters.
        options = {"ignore_eos": True} if ignore_end else {}
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "return_token_ids": True}
        choice = self._complete(**body, **options)["choices"][0]
        # Servers other than vLLM return text only.
        tokens = choice.get("token_ids")
        if tokens is None:
            tokens = self._tokenizer.encode(choice["text"], special=False)
        return Generation(tuple(tokens), choice["text"])

    def score(self, tokens: Sequence[int], *, distribution: bool = False, rows: Sequence[int] | None = None) -> Scores:
        if distribution:
            raise ValueError("a server gives no whole distributions; use engine transformers for the KL divergence")
        choice = self._complete(prompt=list(tokens), max_tokens=1, prompt_logprobs=1)["choices"][0]
        entries = choice.get("prompt_logprobs")
        if entries is None:
            raise ValueError("the server returned no prompt_logprobs, which perplexity and agreement need; vLLM does")
        log_probs = [row[str(token)]["logprob"] for row, token in zip(entries[1:], tokens[1:], strict=True)]
        top1 = [int(next(token for token, entry in row.items() if entry["rank"] == 1)) for row in entries[1:]]
        return Scores(np.asarray(log_probs, np.float32), np.asarray(top1, np.int64))

    def _complete(self, **body: Any) -> Any:
        return self._call("POST", "completions", {"model": self._served_model, "temperature": 0.0, **body})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(f"the server at {self._client.base_url} does not answer: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"the server answered {response.status_code} to {path}: {response.text[:200]}")
        return response.json()

    def capacity_tokens(self) -> int | None:
        return None

    def close(self) -> None:
        self._client.close()
