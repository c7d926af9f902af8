"""Which layer keeps how many channels: greedy search from full rank down to an exact budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

Slot = tuple[int, int]
"""(0 for keys or 1 for values, position among the compressed layers)."""

Ranks = dict[Slot, int]


def greedy_ranks(
    full: int,
    step: int,
    smallest: int,
    budgets: Sequence[tuple[Sequence[Slot], int]],
    measure: Callable[[Ranks], float],
    progress: Callable[[int, int], None],
) -> Ranks:
    """Channels per slot: again and again, the slot whose cut by `step` raises the loss least is cut.

    Losses found in earlier rounds are lower bounds of what the same cut costs now, as far as errors add up, so only
    slots that look best are measured again ("lazy greedy", Minoux 1978), not all of them after every cut.

    Args:
        full: where every slot starts.
        smallest: no slot gets fewer.
        budgets: groups of slots, and what each group's ranks must add up to.
        measure: the loss at some ranks.
        progress: called with channels cut and to cut.

    Returns:
        Ranks that meet every budget exactly.
    """
    ranks = {slot: full for slots, _ in budgets for slot in slots}
    group_of = {slot: group for group, (slots, _) in enumerate(budgets) for slot in slots}
    to_cut = [full * len(slots) - total for slots, total in budgets]
    assert all(0 <= cut <= (full - smallest) * len(slots) for cut, (slots, _) in zip(to_cut, budgets, strict=True))
    whole, cuts_made = sum(to_cut), 0

    def size(slot: Slot) -> int:
        return min(step, to_cut[group_of[slot]], ranks[slot] - smallest)

    def entry(slot: Slot) -> tuple[float, Slot, int, int]:
        return measure({**ranks, slot: ranks[slot] - size(slot)}), slot, cuts_made, size(slot)

    queue = [entry(slot) for slot in sorted(ranks) if size(slot) > 0]
    heapq.heapify(queue)
    while queue:
        progress(whole - sum(to_cut), whole)
        _, slot, measured_after, cut = heapq.heappop(queue)
        if size(slot) == 0:
            continue
        if measured_after == cuts_made and cut == size(slot):
            ranks[slot] -= cut
            to_cut[group_of[slot]] -= cut
            cuts_made += 1
        if size(slot) > 0:
            heapq.heappush(queue, entry(slot))
    assert not any(to_cut)
    progress(whole, whole)
    return ranks


def by_side(ranks: Mapping[Slot, int], layers: int) -> list[tuple[int, int]]:
    """(keys, values) of each compressed layer."""
    return [(ranks[0, position], ranks[1, position]) for position in range(layers)]
