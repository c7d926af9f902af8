"""Prompts of a wanted length: how much filler fits, and the middle cut out of what is too long."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeVar

from kvcompress_eval.tasks.ruler import NotApplicableError
from kvcompress_eval.tokenizer import TextTokenizer

Drawn = TypeVar("Drawn")


def most_that_fits(tokens_at: Callable[[int], int], room: int) -> int:
    """The largest n for which `tokens_at(n) <= room`.

    `tokens_at` grows about evenly with n, so each guess is drawn from the ones before; a handful of calls suffice,
    which matters as each one tokenizes a whole prompt.

    Raises:
        NotApplicableError: not even n = 0 fits.
    """
    empty = tokens_at(0)
    if empty > room:
        raise NotApplicableError(f"too short: the bare question takes {empty} tokens, {room} are left for it")
    low, at_low, high, guess = 0, empty, None, 16
    while high is None or high - low > 1:
        tokens = tokens_at(guess)
        if tokens <= room:
            low, at_low = guess, tokens
        else:
            high = guess
        each = max((tokens - empty) / guess, 1e-3)
        guess = low + max(1, int((room - at_low) / each))
        if high is not None:
            guess = max(low + 1, min(guess, high - 1))
    return low


def cut_middle(text: str, tokenizer: TextTokenizer, room: int | None) -> tuple[str, bool]:
    """The text, or its first and last `room / 2` tokens where it has more than `room`; and whether it was cut.

    As LongBench does it: the tokens of the whole prompt, special ones included, are halved, decoded and joined. Where
    the joined text takes more tokens than its halves did, a little more is cut, so that it always fits.
    """
    tokens = tokenizer.encode(text)
    if room is None or len(tokens) <= room:
        return text, False
    half = room // 2
    while half > 0:
        joined = tokenizer.decode(tokens[:half]) + tokenizer.decode(tokens[-half:])
        excess = len(tokenizer.encode(joined)) - room
        if excess <= 0:
            return joined, True
        half -= (excess + 1) // 2
    raise NotApplicableError(f"too short: {room} tokens leave nothing of the prompt")


def draw_fitting(
    draw: Callable[[Random, int], Drawn], seed: str, size: int, tokens: Callable[[Drawn], list[int]], room: int
) -> tuple[list[int], Drawn]:
    """Draw a sample of the size, from its own random stream, or a smaller one that fits.

    Raises:
        NotApplicableError: not even size 0 fits.
    """
    while True:
        drawn = draw(Random(seed), size)
        prompt = tokens(drawn)
        excess = len(prompt) - room
        if excess <= 0:
            return prompt, drawn
        if size == 0:
            raise NotApplicableError(f"too short: the bare question takes {len(prompt)} tokens, {room} are left for it")
        size -= max(1, excess * size // len(prompt))
