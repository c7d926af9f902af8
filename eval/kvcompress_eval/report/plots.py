"""Plots as inline SVG. Colours come from the page's style sheet (`c0`, `c1`, ... per model), so both themes work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kvcompress_eval.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, frame, thousands
from kvcompress_eval.report.labels import place


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
    """One curve; None where there is no value."""

    colour: int
    dashed: bool
    values: Sequence[float | None]
    positions: Sequence[float]


def pareto(points: Sequence[Point]) -> str:
    """Score against bytes per token, with intervals, and a line along the models that no other one beats in both."""
    x = Scale(0, 1.12 * max(point.x for point in points), LEFT, WIDTH - RIGHT)
    floor = min(point.low for point in points)
    ceiling = max(point.high for point in points)
    pad = max(1.0, 0.08 * (ceiling - floor))
    y = Scale(max(0.0, floor - pad), min(100.0, ceiling + pad), HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, "KV cache, bytes per token", "score", thousands)]
    parts += [
        f'<path class="reference" d="M{LEFT} {y(point.y):.1f}H{WIDTH - RIGHT}"/>' for point in points if point.is_base
    ]
    best = front(points)
    path = f"M{x(best[0].x):.1f} {y(best[0].y):.1f}" + "".join(f"H{x(p.x):.1f}V{y(p.y):.1f}" for p in best[1:])
    parts.append(f'<path class="front" d="{path}"/>')
    spots = _beside(points, x)
    for point, px in zip(points, spots, strict=True):
        parts.append(f'<path class="whisker c{point.colour}" d="M{px:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>')
    for point, px in zip(points, spots, strict=True):
        shape = "dot hollow" if point.is_base else "dot"
        title = f"{point.name}: {point.y:.1f} [{point.low:.1f}, {point.high:.1f}] at {point.x:,.0f} bytes"
        parts.append(
            f'<circle class="{shape} c{point.colour}" cx="{px:.1f}" cy="{y(point.y):.1f}" r="5.5">'
            f"<title>{escape(title)}</title></circle>"
        )
    for label in place([(px, y(point.y), point.name) for point, px in zip(points, spots, strict=True)]):
        at = f'x="{label.x:.1f}" y="{label.y:.1f}" text-anchor="{label.anchor}"'
        parts.append(f'<text class="label" {at}>{escape(label.name)}</text>')
    return frame("Score against KV cache bytes per token", parts)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in size and score, by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda item: (item.x, -item.y)):
        if not found or point.y > found[-1].y:
            found.append(point)
    return found


def _beside(points: Sequence[Point], x: Scale) -> list[float]:
    """Horizontal positions; points of the same size stand side by side, so that each one's interval can be seen."""
    found = []
    for at, point in enumerate(points):
        same = [other for other, item in enumerate(points) if abs(x(item.x) - x(point.x)) < 1]
        found.append(x(point.x) + 9 * (same.index(at) - (len(same) - 1) / 2))
    return found


def layer_errors(lines: Sequence[Line]) -> str:
    """Relative error over layers."""
    values = [value for line in lines for value in line.values if value is not None]
    last = max(position for line in lines for position in line.positions)
    x = Scale(0, max(last, 1), LEFT, WIDTH - RIGHT)
    y = Scale(0, 1.08 * max(values) or 1.0, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, "layer", "relative error", lambda value: f"{value:g}", whole_x=True)]
    return frame("Relative error of the attention output per layer", parts + [_curve(line, x, y) for line in lines])


def drift(lines: Sequence[Line], end: float) -> str:
    """KL divergence over positions, up to `end`, on a logarithmic scale."""
    values = [value for line in lines for value in line.values if value]
    if not values:
        return ""
    x = Scale(0, end, LEFT, WIDTH - RIGHT)
    y = Scale(min(values) / 1.3, max(values) * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    parts = [axes(x, y, "position, tokens", "KL, nats per token", thousands)]
    return frame("KL divergence from the base model by position", parts + [_curve(line, x, y) for line in lines])


def _curve(line: Line, x: Scale, y: Scale) -> str:
    pairs = zip(line.positions, line.values, strict=True)
    # A logarithmic axis has no place for 0, which an exact codec reaches.
    kept = [(x(at), y(value)) for at, value in pairs if value is not None and (value > 0 or not y.log)]
    if not kept:
        return ""
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in kept)
    style, shape = (" dashed", "dot small hollow") if line.dashed else ("", "dot small")
    dots = "".join(f'<circle class="{shape} c{line.colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in kept)
    return f'<path class="curve c{line.colour}{style}" d="{path}"/>{dots}'


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
