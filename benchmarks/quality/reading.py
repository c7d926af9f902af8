"""What the figures say about us, in sentences made from them: where a peer of the same size is better, and how much."""

from __future__ import annotations

from typing import Any

from .table import kl

SIZE = 0.9
"""A peer that is larger by up to a tenth is still one of the same size."""
EVEN = 1.1
"""KL divergences closer than this factor are called even: windows of other text move them by as much."""


def sentences(results: dict[str, Any], length: str) -> list[str]:
    """One per row of ours that has a peer of its size or smaller: who is better at that length of windows."""
    rows = [row for row in results["rows"] if length in row["lengths"]]
    peers = [row for row in rows if not row["ours"]]
    if not peers:
        return []
    said = []
    for row in sorted((row for row in rows if row["ours"]), key=lambda row: row["lengths"][length]["ratio"]):
        mine = row["lengths"][length]
        rivals = [peer for peer in peers if peer["lengths"][length]["ratio"] >= SIZE * mine["ratio"]]
        if not rivals:
            nearest = max(peers, key=lambda peer: peer["lengths"][length]["ratio"])
            theirs = nearest["lengths"][length]
            said.append(
                f"`{row['name']}` ({_figures(mine)}): no peer here is as small; the smallest is {nearest['name']} "
                f"({_figures(theirs)})."
            )
            continue
        best = min(rivals, key=lambda peer: peer["lengths"][length]["kl"])
        theirs = best["lengths"][length]
        factor = mine["kl"] / theirs["kl"]
        if factor > EVEN:
            verdict = f"**loses** to {best['name']} ({_figures(theirs)}): {factor:.1f} times its KL."
        elif factor < 1 / EVEN:
            verdict = f"the best peer of its size or smaller is {best['name']} ({_figures(theirs)}), with "
            verdict += f"{1 / factor:.1f} times its KL."
        else:
            verdict = f"even with {best['name']} ({_figures(theirs)})."
        said.append(f"`{row['name']}` ({_figures(mine)}): {verdict}")
    return said


def _figures(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.2f}x, KL {kl(found['kl'])}"
