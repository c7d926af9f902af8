"""Progress away from a terminal: when a step starts and ends, and in between how long is left."""

from __future__ import annotations

import pytest
from kvcompress_cli.show import EVERY, Lines, duration


class Watch:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def written() -> list[str]:
    return []


@pytest.fixture
def lines(watch: Watch, written: list[str]) -> Lines:
    return Lines(written.append, watch)


def test_a_short_step_has_two_lines(lines: Lines, watch: Watch, written: list[str]) -> None:
    for done in range(11):
        lines("layers", done, 10)
        watch.now += 1
    lines("layers", 10, 10)
    assert written == ["layers: started", "layers: done"]


def test_a_long_step_says_how_long_is_left(lines: Lines, watch: Watch, written: list[str]) -> None:
    for done in range(41):
        lines("samples", done, 40)
        watch.now += 10
    said = written[1:-1]
    assert written[0] == "samples: started"
    assert said[0] == "samples: 3 of 40, about 6 min left"
    assert said[-1] == "samples: 39 of 40, about 10 s left"
    assert len(said) == 400 / EVERY // 1
    assert written[-1] == "samples: done"


def test_what_a_resumed_step_had_before_does_not_count_as_speed(lines: Lines, watch: Watch, written: list[str]) -> None:
    lines("samples", 90, 100)
    watch.now = 40
    lines("samples", 92, 100)
    assert written[-1] == "samples: 92 of 100, about 2 min 40 s left".replace("2 min 40 s", duration(160))


def test_nothing_done_yet_promises_nothing(lines: Lines, watch: Watch, written: list[str]) -> None:
    lines("samples", 0, 100)
    watch.now = 40
    lines("samples", 0, 100)
    assert written[-1] == "samples: 0 of 100"


def test_bytes_and_tokens_are_shares(lines: Lines, watch: Watch, written: list[str]) -> None:
    lines("hashing", 0, 10**9)
    watch.now = 40
    lines("hashing", 10**8, 10**9)
    assert written[-1] == "hashing: 10 %, about 6 min left"


def test_steps_side_by_side_have_their_own_lines(lines: Lines, watch: Watch, written: list[str]) -> None:
    lines("whole", 0, 100)
    for step in ("one", "two"):
        lines(step, 0, 1)
        watch.now += 20
        lines(step, 1, 1)
        lines("whole", 30, 100)
    assert written == [
        "whole: started",
        "one: started",
        "one: done",
        "two: started",
        "two: done",
        "whole: 30 of 100, about 93 s left",
    ]


def test_a_remark_is_a_line_of_its_own(lines: Lines, written: list[str]) -> None:
    lines("the model has no chat template", 1, 1)
    assert written == ["the model has no chat template"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (119, "119 s"), (150, "2 min"), (7100, "118 min"), (9000, "2.5 h")]
)
def test_durations_are_rounded_to_what_matters(seconds: float, text: str) -> None:
    assert duration(seconds) == text
