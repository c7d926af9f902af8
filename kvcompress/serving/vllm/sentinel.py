"""The sentinel: while the engine serves, it decodes a page of the cache now and then and looks whether it still can.

It is for what no start-up check can see: memory that fails, a block that another process or a faulty transfer has
overwritten. A page is sound if everything in it decodes to finite values of a size that the encoder could have meant.
A damaged page does not stop the server: an operator sees the log line and the counter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.metadata import Step
from kvcompress.serving.vllm.metrics import Numbers
from kvcompress.serving.vllm.served import Served

SHARE = 0.004
"""Of the time the engine works: what the sentinel may take."""

LONGEST_STEP = 0.1
"""Seconds of one step that count as work. An engine without requests also takes long until its next step."""

LARGEST = 4096.0
"""Bound on a latent, in standard deviations of its channel on the calibration text."""


class Sentinel:
    """Asked at every step; looks at a page whenever it has saved up the time that the last look took.

    A look takes two steps of a layer and is concluded at the next look. One step picks a page, the next one decodes it:
    requests of one step share the blocks of a common prefix as soon as the first of them is about to write it. The
    verdict is read when it has reached the host, so nobody waits for the device.
    """

    def __init__(
        self, layers: Sequence[Served], numbers: Numbers, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._layers, self._numbers, self._clock = layers, numbers, clock
        self._random = random.Random(0)
        self._last, self._saved, self._cost = clock(), 0.0, 0.0
        self._next = self._random.choice(layers)
        self._picked: Tensor | None = None
        self._looked: _Verdict | None = None

    def step(self, names: Sequence[str], step: Step) -> None:
        """A step of some layers is about to run; asked once per step and cache group.

        Args:
            names: the layers, all of which have the step's block table.
            step: what the layers are given.
        """
        now = self._clock()
        self._saved += SHARE * min(now - self._last, LONGEST_STEP)
        self._last = now
        if self._next.layer.name not in names:
            return
        if self._picked is not None:
            if self._looked is not None and not self._looked.arrived():
                return
            self._conclude()
            self._look(step)
        elif self._saved >= self._cost:
            self._cost = 0.0
            self._pick(step)
        else:
            return
        spent = self._clock() - now
        self._cost += spent
        self._saved -= spent

    def _pick(self, step: Step) -> None:
        """A random page that is full when this step has run."""
        if step.longest is None:
            return
        # Of bounds that are too large, `_look` finds out.
        pages = (step.longest // self._next.layer.cache.shape[2]).tolist()
        requests = [request for request, count in enumerate(pages) if count > 0]
        if requests:
            request = self._random.choice(requests)
            # A copy: the engine writes the next step's table over this one.
            block = step.block_table[request, self._random.randrange(pages[request])]
            self._picked = block.long().reshape(1).clone()

    def _look(self, step: Step) -> None:
        assert self._picked is not None
        served, block_1 = self._next, self._picked
        # A block that changed hands since may have been cleared for its new owner.
        filled_R = (step.seq_lens - step.query_starts.diff()) // served.layer.cache.shape[2]
        held_RN = step.block_table == block_1
        column_N = torch.arange(held_RN.shape[1], device=held_RN.device)
        held = (held_RN & (column_N < filled_R.to(held_RN.device)[:, None])).any()
        found = torch.stack([held, is_sound(served, block_1)]).long()
        self._looked = _Verdict(served, torch.cat([found, block_1]))
        self._picked, self._next = None, self._random.choice(self._layers)

    def _conclude(self) -> None:
        if self._looked is None:
            return
        served, (held, sound, block) = self._looked.served, self._looked.on_host.tolist()
        self._looked = None
        if not held:
            return
        if not sound:
            compat.logger.error(
                "kvcompress: %s, block %d: the page does not decode to values in range; its memory was overwritten or "
                "is faulty, and answers that used it are wrong; restart the server",
                served.name,
                block,
            )
        self._numbers.count(failed=not sound)


class _Verdict:
    """What a look has found of a layer's page, on its way to the host: whether the request still held the page, whether
    it is sound, and which one it is.
    """

    def __init__(self, served: Served, found_3: Tensor) -> None:
        self.served, self.on_host = served, found_3.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if found_3.device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()

    def arrived(self) -> bool:
        """Whether it can be read without waiting for the device."""
        return self._copied is None or self._copied.query()


def is_sound(served: Served, block_1: Tensor) -> Tensor:
    """Whether one page of a layer decodes to values in range, bool `[]` on the page's device.

    A token of nothing but zeros is out of range, too: no encoder leaves one, and memory that was cleared has them. Only
    a side that carries nothing, as in a layer that a merge has switched off, may be zeros.
    """
    sides = [side.flatten(1) for side in served.layer.impl.latents(served.layer.cache, block_1)]
    sound = [
        torch.isfinite(side_TX).all() & (side_TX.abs() <= LARGEST).all() & ((side_TX != 0).any(-1).all() | silent)
        for side_TX, silent in zip(sides, served.codec.silent(), strict=True)
    ]
    return torch.stack(sound).all()
