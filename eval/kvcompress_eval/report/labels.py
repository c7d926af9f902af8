"""Names beside points, placed so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress_eval.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

LETTER, LINE = 6.6, 14.0
"""Width of a letter and height of a line in pixels."""

REACH = 8.0
"""Pixels between a point's middle and its name."""


@dataclass(frozen=True)
class Label:
    """A name at its baseline point; `anchor` as in SVG."""

    name: str
    x: float
    y: float
    anchor: str

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        width = LETTER * len(self.name)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - LINE + 3, left + width, self.y + 3


def place(points: Sequence[tuple[float, float, str]]) -> list[Label]:
    """One label per point (x, y, name): in the first free place beside, above or below it."""
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    placed: list[Label] = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        taken = [*dots, *(label.box for label in placed)]
        free = [label for label in _places(x, y, name) if not any(overlap(label.box, box) for box in taken)]
        inside = [label for label in free if _inside(label.box)]
        placed.append((inside or free or _places(x, y, name))[0])
    return placed


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _places(x: float, y: float, name: str) -> list[Label]:
    """Nearest first: to the right, to the left, above, below, and the same further away."""
    found = []
    for rows in range(9):
        for up in (-1, 1) if rows else (1,):
            at = y + 4 + up * rows * LINE
            found += [Label(name, x + REACH, at, "start"), Label(name, x - REACH, at, "end")]
            if rows:
                found.append(Label(name, x, at, "middle"))
    return found


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= LEFT and box[1] >= TOP - 12 and box[2] <= WIDTH - RIGHT + 12 and box[3] <= HEIGHT - BOTTOM
