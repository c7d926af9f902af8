"""Text a model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvcompress.calibration.generate import USER_TOKENS, Openings, generate

BOS, STOP, END, WORD = 0, 1, 2, 9
CHAT = Openings([BOS], [[20, 21], [22, 23]], [BOS, 30, 31], [STOP, 32], [STOP, 33], frozenset({STOP, END}))
PLAIN = Openings([], [[20, 21], [22, 23], [24]], [], [], [], frozenset({END}))


class Model(nn.Module):
    """Says after each token what a table says, and nothing else."""

    def __init__(self, after: Callable[[list[int]], int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.after = after

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> SimpleNamespace:
        said = (
            input_ids.tolist()
            if past_key_values is None
            else [a + b for a, b in zip(past_key_values, input_ids.tolist(), strict=True)]
        )
        logits = torch.full((len(said), 1, 50), -100.0)
        for row, tokens in enumerate(said):
            logits[row, 0, self.after(tokens)] = 100.0
        return SimpleNamespace(past_key_values=said, logits=logits)


def write(model: Model, starts: Openings, samples: range, length: int) -> list[list[int]]:
    return generate(model, starts, samples, length, torch.Generator().manual_seed(0), lambda step: None).tolist()


def test_the_model_plays_both_sides_and_then_begins_another_text() -> None:
    """Two words, then a stop."""
    model = Model(lambda tokens: STOP if tokens[-2:] == [WORD, WORD] else WORD)
    (found,) = write(model, CHAT, range(1), 17)
    chat = [BOS, 30, 31, WORD, WORD, STOP, 32, WORD, WORD, STOP, 33]
    assert found == [*chat, 22, 23, WORD, WORD, STOP, BOS]


def test_a_user_without_end_is_interrupted() -> None:
    (found,) = write(Model(lambda tokens: WORD), CHAT, range(1), 150)
    assert found[3 : 3 + USER_TOKENS] == [WORD] * USER_TOKENS
    assert found[3 + USER_TOKENS :] == [STOP, 32, *[WORD] * (150 - 5 - USER_TOKENS)]


def test_samples_begin_differently_and_with_the_first_token_once() -> None:
    found = write(Model(lambda tokens: WORD), CHAT, range(4), 5)
    assert [tokens[:3] for tokens in found] == [[BOS, 30, 31], [BOS, 22, 23], [BOS, 30, 31], [BOS, WORD, WORD]]


def test_without_template_and_first_token_seeds_begin_every_text() -> None:
    found = write(Model(lambda tokens: END if tokens[-1] == WORD else WORD), PLAIN, range(4), 6)
    assert found == [
        [20, 21, WORD, END, 22, 23],
        [22, 23, WORD, END, 24, WORD],
        [24, WORD, END, 20, 21, WORD],
        [20, 21, WORD, END, 22, 23],
    ]


def test_draws_follow_the_seed_and_the_models_probabilities() -> None:
    class Fair(Model):
        def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> SimpleNamespace:
            logits = torch.full((len(input_ids), 1, 50), -100.0)
            logits[..., 10], logits[..., 11], logits[..., 12] = 3.0, 2.0, -3.0  # the last is beyond the top 95 %
            return SimpleNamespace(past_key_values=None, logits=logits)

    def draw(seed: int) -> list[int]:
        made = generate(
            Fair(lambda _: 0), PLAIN, range(1), 2000, torch.Generator().manual_seed(seed), lambda step: None
        )
        return made[0, 2:].tolist()

    found = draw(0)
    assert found == draw(0) != draw(1)
    assert set(found) == {10, 11}
    assert found.count(10) / len(found) == pytest.approx(0.731, abs=0.04)


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Broken(Model):
        def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(past_key_values=None, logits=torch.full((len(input_ids), 1, 50), float("nan")))

    with pytest.raises(ValueError, match="not finite"):
        write(Broken(lambda _: 0), PLAIN, range(1), 8)
