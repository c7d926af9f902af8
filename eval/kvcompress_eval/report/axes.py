"""Scales, axes and the frame of a plot, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Scale:
    """A map from data to pixels, with round ticks; linear, or logarithmic for values above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(item) if self.log else item for item in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            found = [10.0**power for power in powers]
            return found if len(found) > 1 else [self.low, *found, self.high]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def axes(
    x: Scale, y: Scale, x_title: str, y_title: str, x_text: Callable[[float], str], *, whole_x: bool = False
) -> str:
    """Grid lines, numbers and titles."""
    parts = []
    for tick in y.ticks():
        py = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{py + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        if whole_x and tick != int(tick):
            continue
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{escape(x_text(tick))}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="title" x="{middle:.0f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_title)}</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="title" transform="translate(13 {height:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )
    return "".join(parts)


def frame(title: str, parts: Sequence[str]) -> str:
    """The plot around its parts."""
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def number(value: float) -> str:
    """At most five characters, so that it stays clear of the axis title."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 0.01 else f"{value:.3g}"


def thousands(value: float) -> str:
    return f"{value:,.0f}"
