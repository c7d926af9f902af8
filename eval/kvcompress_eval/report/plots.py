"""Plots as inline SVG. Colours come from the page's style sheet (`c0`, `c1`, ... per model), so both themes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class Point:
    """One model in the plot of score against size."""

    name: str
    colour: int
    x: float
    y: float
    low: float
    high: float
    is_base: bool


@dataclass(frozen=True)
class Line:
    """One curve over layers; None where a layer has no value."""

    colour: int
    dashed: bool
    values: Sequence[float | None]


def pareto(points: Sequence[Point]) -> str:
    """Score against bytes per token, with intervals. Up and to the left is better."""
    x = Scale(0, 1.12 * max(point.x for point in points), LEFT, WIDTH - RIGHT)
    floor = min(point.low for point in points)
    ceiling = max(point.high for point in points)
    pad = max(1.0, 0.08 * (ceiling - floor))
    y = Scale(max(0.0, floor - pad), min(100.0, ceiling + pad), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, "KV cache, bytes per token", "score", _thousands)]
    for point in points:
        if point.is_base:
            parts.append(f'<path class="reference" d="M{LEFT} {y(point.y):.1f}H{WIDTH - RIGHT}"/>')
    for point in points:
        px, py = x(point.x), y(point.y)
        parts.append(f'<path class="whisker c{point.colour}" d="M{px:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>')
        shape = "dot hollow" if point.is_base else "dot"
        title = f"{point.name}: {point.y:.1f} [{point.low:.1f}, {point.high:.1f}] at {point.x:,.0f} bytes"
        parts.append(
            f'<circle class="{shape} c{point.colour}" cx="{px:.1f}" cy="{py:.1f}" r="5.5">'
            f"<title>{escape(title)}</title></circle>"
        )
    parts += _labels([(x(point.x), y(point.y), point.name) for point in points])
    return _svg("Score against KV cache bytes per token", parts)


def layer_errors(lines: Sequence[Line]) -> str:
    """Relative error over layers."""
    count = max(len(line.values) for line in lines)
    top = max(value for line in lines for value in line.values if value is not None)
    x = Scale(0, max(count - 1, 1), LEFT, WIDTH - RIGHT)
    y = Scale(0, 1.08 * top or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, "layer", "relative error", lambda value: f"{value:g}", whole_x=True)]
    for line in lines:
        kept = [(x(at), y(value)) for at, value in enumerate(line.values) if value is not None]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in kept)
        style = " dashed" if line.dashed else ""
        parts.append(f'<path class="curve c{line.colour}{style}" d="{path}"/>')
        shape = "dot small hollow" if line.dashed else "dot small"
        parts += [f'<circle class="{shape} c{line.colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in kept]
    return _svg("Relative error of keys and values per layer", parts)


def forest(delta: float, low: float, high: float, margin: float, reach: float, colour: int) -> str:
    """One row of a forest plot: the interval of a difference, zero, and the tolerated loss shaded."""
    x = Scale(-reach, reach, 4, 156)
    left = max(low, -reach)
    right = min(high, reach)
    return (
        '<svg class="forest" viewBox="0 0 160 22" role="img" aria-label="'
        f'difference {delta:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}">'
        f'<rect class="tolerated" x="{x(-margin):.1f}" y="1" width="{x(0) - x(-margin):.1f}" height="20"/>'
        f'<path class="zero" d="M{x(0):.1f} 1V21"/>'
        f'<path class="whisker c{colour}" d="M{x(left):.1f} 11H{x(right):.1f}"/>'
        f'<circle class="dot c{colour}" cx="{x(min(max(delta, -reach), reach)):.1f}" cy="11" r="4"/></svg>'
    )


def _axes(x: Scale, y: Scale, x_title: str, y_title: str, x_text: object, *, whole_x: bool = False) -> str:
    assert callable(x_text)
    parts = []
    for tick in y.ticks():
        py = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{py + 4:.1f}" text-anchor="end">{tick:g}</text>')
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


def _labels(points: list[tuple[float, float, str]]) -> list[str]:
    """A name beside each point, on the side with more room, moved up where two would meet."""
    placed: list[tuple[float, float]] = []
    parts = []
    for px, py, name in sorted(points):
        right = px < (LEFT + WIDTH) / 2
        ty = py - 9
        while any(abs(px - other_x) < 110 and abs(ty - other_y) < 14 for other_x, other_y in placed):
            ty -= 14
        placed.append((px, ty))
        tx, anchor = (px + 9, "start") if right else (px - 9, "end")
        at = f'x="{tx:.1f}" y="{max(ty, 11):.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {at}>{escape(name)}</text>')
    return parts


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
