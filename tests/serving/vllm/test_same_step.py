"""A prompt that begins with blocks which another request of the same step is about to fill: vLLM schedules that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import require

require.need("vllm")

from kvcompress.serving.vllm import canary_paths, compat
from kvcompress.serving.vllm.canary_paths import Path
from tests.serving.vllm import canary_layers

BLOCK = canary_layers.BLOCK
LENGTH = 2 * BLOCK + 9


@pytest.mark.parametrize("reader_first", [True, False])
@pytest.mark.parametrize("form", canary_layers.FORMS)
def test_both_requests_get_the_same_answers(form: str, reader_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    canary_layers.without_an_engine(monkeypatch)
    members, inputs = canary_layers.make(form)
    device = torch.device("cpu")
    writer, reader = Path("", (5, 3, 7), 1, ((0, LENGTH),)), Path("", (5, 2, 8), 4, ((BLOCK, LENGTH),))
    batch = [reader, writer] if reader_first else [writer, reader]
    steps = [canary_paths.metadata(path, path.steps[0], BLOCK, device) for path in batch]
    rings = [canary_paths.ring_metadata(path, device) for path in batch]
    counts = torch.tensor([0, *(step.num_actual_tokens for step in steps)])
    step = replace(
        steps[0],
        num_actual_tokens=int(counts.sum()),
        slot_mapping=torch.cat([step.slot_mapping for step in steps]),
        block_table=torch.cat([step.block_table for step in steps]),
        query_starts=counts.cumsum(0),
        seq_lens=torch.cat([step.seq_lens for step in steps]),
    )
    ring = replace(rings[0], block_table=torch.cat([ring.block_table for ring in rings]))
    rows = torch.cat([torch.arange(*path.steps[0]) for path in batch])
    metadata = {member.layer.name: step for member in members}
    metadata |= {member.ring.name: ring for member in members if member.ring is not None}
    with compat.running(None, metadata, len(rows)):
        for member, given in zip(members, inputs, strict=True):
            query, key, value = (x_THD[rows] for x_THD in given)
            output = torch.full((*query.shape[:2], value.shape[2]), torch.nan)
            member.layer.impl.forward(member.layer.module, query, key, value, member.layer.cache, step, output)
            parts = dict(zip(("first", "second"), output.split(counts[1:].tolist()), strict=True))
            read, written = (parts["first"], parts["second"]) if reader_first else (parts["second"], parts["first"])
            torch.testing.assert_close(read, written[BLOCK:], atol=1e-4, rtol=1e-4)
