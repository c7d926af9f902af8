"""Text a model writes itself: sampled token by token, begun in several ways so that it is varied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompress.calibration import bundled, chat, tokenizer
from kvcompress.calibration.rows import Text

TEMPERATURE, TOP_P, TOP_K = 1.0, 0.95, 512
"""How a token is drawn: from the most likely ones that together have `TOP_P`, `TOP_K` at most."""
SEED_TOKENS = 12
"""Tokens of the built-in text that begin a text of its kind."""
USER_TOKENS = 96
"""After so many tokens the user, whom the model plays as well, is taken to have asked."""


@dataclass(frozen=True)
class Openings:
    """What texts begin with. Parts of a conversation are empty where the model has no chat template.

    Attributes:
        begin: the token every sample starts with, if any.
        seeds: first words of texts of many kinds.
        before, middle, after: what the chat template puts around a user's message and the assistant's.
        stops: tokens that end a text or a message.
    """

    begin: list[int]
    seeds: list[list[int]]
    before: list[int]
    middle: list[int]
    after: list[int]
    stops: frozenset[int]


def openings(text_tokenizer: Any, stops: Sequence[int], seed: int) -> Openings:
    """Openings for a model, in an order that the seed decides.

    Raises:
        ValueError: the tokenizer fails.
    """
    texts = [row.text[:400] for rows in bundled.kinds().values() for row in rows if isinstance(row, Text)]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(texts))
    seeds = tokenizer.encode(text_tokenizer, [texts[at] for at in order.tolist()])
    before, middle, after = _turns(text_tokenizer)
    begin = [] if text_tokenizer.bos_token_id is None else [int(text_tokenizer.bos_token_id)]
    ends = {token for part in (middle[:1], after[:1]) for token in part if token in text_tokenizer.all_special_ids}
    seeds = [ids[:SEED_TOKENS] for ids in seeds if ids]
    return Openings(begin, seeds, before, middle, after, frozenset({*stops, *ends}))


def generate(
    model: Any,
    starts: Openings,
    samples: range,
    length: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sample sequences, all at once, token by token.

    Args:
        model: a transformers causal language model.
        samples: numbers of the sequences; they decide how each begins.
        generator: on the CPU.
        progress: told how many tokens of each are there.

    Returns:
        Token ids `[samples, length]`.

    Raises:
        ValueError: the model's outputs are not finite.
    """
    writers = [_Writer(starts, number) for number in samples]
    device = next(model.parameters()).device
    cache: Any = None
    probable_BV: Tensor | None = None
    with torch.inference_mode():
        for step in range(length):
            drawn = [None] * len(writers) if probable_BV is None else _draw(probable_BV, generator)
            tokens = [writer.next(token) for writer, token in zip(writers, drawn, strict=True)]
            if step + 1 < length:
                made = model(
                    input_ids=torch.tensor(tokens, device=device)[:, None], past_key_values=cache, use_cache=True
                )
                cache, probable_BV = made.past_key_values, made.logits[:, -1].float().cpu()
            progress(step + 1)
    return np.array([writer.tokens for writer in writers], dtype=np.int64)


@dataclass
class _Writer:
    """One sequence: texts one after the other, each opened by what is `forced`, then drawn until it stops."""

    starts: Openings
    number: int
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._script = self._texts()
        self._forced = [*self.starts.begin, *next(self._script)]
        if self.starts.begin and self._forced[1:2] == self.starts.begin:
            del self._forced[0]
        self._free = 0

    def next(self, drawn: int | None) -> int:
        """The next token: a forced one, or else the one drawn."""
        if self._forced:
            token, self._free = self._forced.pop(0), 0
        else:
            assert drawn is not None
            token = drawn
            self._free += 1
            if token in self.starts.stops or (self._asking and self._free == USER_TOKENS):
                self._forced = list(next(self._script))
                if self._forced[:1] == [token]:
                    del self._forced[0]
        self.tokens.append(token)
        return token

    def _texts(self) -> Iterator[list[int]]:
        """What is forced at the beginning, and each time a text or message stops."""
        starts = self.starts
        left: list[int] = []
        for turn in count(self.number):
            self._asking = bool(starts.middle) and turn % 2 == 0
            if self._asking:
                yield [*left, *starts.before]
                self._asking = False
                yield starts.middle
                left = starts.after
            else:
                # Every second text of these begins with nothing but BOS, where there is one.
                bare = bool(starts.begin) and turn % 4 == 3
                seed = starts.begin if bare else starts.seeds[turn % len(starts.seeds)]
                yield [*left, *seed]
                left = []


def _draw(logits_BV: Tensor, generator: torch.Generator) -> list[int]:
    if not bool(logits_BV.isfinite().all()):
        raise ValueError("the model's outputs are not finite, so no text can be sampled; give calibration text")
    best_BK, ids_BK = (logits_BV / TEMPERATURE).topk(min(TOP_K, logits_BV.shape[1]))
    p_BK = best_BK.softmax(-1)
    p_BK = p_BK * (p_BK.cumsum(-1) - p_BK < TOP_P)
    return ids_BK.gather(1, torch.multinomial(p_BK, 1, generator=generator))[:, 0].tolist()


def _turns(text_tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """What the chat template puts before, between and after a question and its answer; nothing where it cannot."""
    question, answer = "The question of the user.", "The answer of the model."
    nothing: tuple[list[int], list[int], list[int]] = ([], [], [])
    if not chat.has_template(text_tokenizer):
        return nothing
    try:
        made = chat.render(
            text_tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
    except ValueError:
        return nothing
    if made.count(question) != 1 or made.count(answer) != 1 or made.index(answer) < made.index(question):
        return nothing
    before, rest = made.split(question)
    middle, after = rest.split(answer)
    first, second, third = tokenizer.encode(text_tokenizer, [before, middle, after])
    return first, second, third
