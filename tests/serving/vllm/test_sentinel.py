"""The sentinel finds damaged pages of every form, raises no false alarm, and keeps to its share of the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import require

require.need("vllm")

from kvcompress.serving.vllm import canary_paths, compat, metrics
from kvcompress.serving.vllm import sentinel as sentinels
from kvcompress.serving.vllm.canary import answers_to
from kvcompress.serving.vllm.canary_paths import Path as Steps
from kvcompress.serving.vllm.metadata import Step
from kvcompress.serving.vllm.metrics import Collector, Numbers
from kvcompress.serving.vllm.sentinel import Sentinel, is_sound
from kvcompress.serving.vllm.served import Served
from tests.serving.vllm import canary_layers

BLOCK = canary_layers.BLOCK
TABLE = (5, 3, 7)


def filled(form: str, monkeypatch: pytest.MonkeyPatch) -> list[Served]:
    """Layers whose blocks `TABLE` hold the tokens of one request; the last block is not full."""
    canary_layers.without_an_engine(monkeypatch)
    members, inputs = canary_layers.make(form)
    path, device = Steps("", TABLE, 1, ((0, 2 * BLOCK + 9),)), torch.device("cpu")
    step = canary_paths.metadata(path, path.steps[0], BLOCK, device)
    answers_to(None, members, inputs, [step] * len(members), canary_paths.ring_metadata(path, device), 0)
    return members


def sound(served: Served, block: int) -> bool:
    return bool(is_sound(served, torch.tensor([block])))


@pytest.mark.parametrize("form", canary_layers.FORMS)
def test_damage_is_seen_and_sound_pages_are_not_damaged(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = filled(form, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    for served in members:
        assert sound(served, TABLE[0])
        assert sound(served, TABLE[1])
        page = served.layer.cache[TABLE[1]]
        kept = page.clone()
        page.zero_()
        assert not sound(served, TABLE[1]), "cleared memory"
        noise = torch.randint(256, (page.nbytes,), dtype=torch.uint8, generator=generator)
        page.copy_(noise.view(page.dtype).view(page.shape))
        assert not sound(served, TABLE[1]), "overwritten"
        page.copy_(kept)
        assert sound(served, TABLE[1])


def test_one_gain_out_of_range_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [served] = filled("heads", monkeypatch)
    gains = served.layer.cache[TABLE[0]].view(canary_layers.KV_HEADS, -1)[:, : 2 * BLOCK].view(torch.float16)
    assert float(gains.max()) < 100
    gains[1, 4] = 60000.0
    assert not sound(served, TABLE[0])


class Clock:
    """Time that passes only when it is told to, and by a fixed amount at every reading."""

    def __init__(self, reading: float) -> None:
        self.now, self.reading = 0.0, reading

    def __call__(self) -> float:
        self.now += self.reading
        return self.now


def batch(*lengths: int, tables: list[tuple[int, ...]] | None = None) -> Any:
    """Decoding requests."""
    return Step(
        num_actual_tokens=len(lengths),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        seq_lens=torch.tensor(lengths),
        query_starts=torch.arange(len(lengths) + 1),
        block_table=torch.tensor(tables or [TABLE] * len(lengths)),
        longest=torch.tensor(lengths),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    return tmp_path


def counts(folder: Path) -> tuple[int, int]:
    values = json.loads((folder / "0-0.json").read_text())
    return values["checks"], values["failures"]


def test_a_damaged_page_is_logged_with_its_layer_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    members = filled("heads", monkeypatch)
    sentinel = Sentinel(members, Numbers("0-0", 0, 100, 400, 1000), Clock(0.0))
    names = [members[0].layer.name]
    compat.logger.addHandler(caplog.handler)
    try:
        for _ in range(40):
            sentinel.step(names, batch(2 * BLOCK + 1))
        checks, failures = counts(folder)
        assert checks >= 15
        assert failures == 0
        assert not caplog.records
        members[0].layer.cache[TABLE[1]] = 0xFF
        for _ in range(40):
            sentinel.step(names, batch(2 * BLOCK + 1))
    finally:
        compat.logger.removeHandler(caplog.handler)
    assert counts(folder)[1] > 0
    assert f"layer 0 (layers.0.attn), block {TABLE[1]}: the page does not decode to values in range" in caplog.text


def test_pages_that_are_not_full_or_changed_hands_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [served] = filled("heads", monkeypatch)
    served.layer.cache[list(TABLE)] = 0xFF
    sentinel = Sentinel([served], Numbers("0-0", 0, 100, 400, 1000), Clock(0.0))
    names = [served.layer.name]
    for _ in range(10):
        sentinel.step(names, batch(BLOCK - 1, 1))
    # Picked in one step, somebody else's in the next, in which it is not written yet.
    for _ in range(10):
        sentinel.step(names, batch(BLOCK + 1, tables=[(2, 8)]))
        sentinel.step(names, batch(BLOCK + 1, tables=[(9, 2)]))
    assert counts(folder) == (0, 0)


def test_it_waits_for_the_layers_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders of other layers are asked in the same step, when its pages are not written yet."""
    [served] = filled("heads", monkeypatch)
    sentinel = Sentinel([served], Numbers("0-0", 0, 100, 400, 1000), Clock(0.0))
    for _ in range(10):
        sentinel.step(["another layer"], batch(2 * BLOCK))
    assert counts(folder) == (0, 0)


@pytest.mark.parametrize("step", [0.002, 0.05, 0.1])
def test_it_keeps_to_its_share_of_the_time(step: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [served] = filled("heads", monkeypatch)
    clock = Clock(0.001)  # every look takes a millisecond or more
    sentinel = Sentinel([served], Numbers("0-0", 0, 100, 400, 1000), clock)
    clock.now, clock.reading = 0.0, 0.0
    stock, spent = sentinels.is_sound, 0.0

    def slow(*arguments: Any) -> Any:
        nonlocal spent
        clock.now += 0.001
        spent += 0.001
        return stock(*arguments)

    monkeypatch.setattr(sentinels, "is_sound", slow)
    for _ in range(3000):
        clock.now += step
        sentinel.step([served.layer.name], batch(2 * BLOCK + 1))
    assert spent > 0.5 * sentinels.SHARE * 3000 * step
    assert spent <= 0.005 * 3000 * step


def test_idle_time_is_not_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [served] = filled("heads", monkeypatch)
    clock = Clock(0.0)
    sentinel = Sentinel([served], Numbers("0-0", 0, 100, 400, 1000), clock)
    clock.now += 3600
    sentinel.step([], batch(2 * BLOCK))
    assert sentinel._saved == pytest.approx(sentinels.SHARE * sentinels.LONGEST_STEP)


# The metrics endpoint.


def collected(folder: Path) -> dict[tuple[str, str], float]:
    samples = [sample for family in Collector(folder).collect() for sample in family.samples]
    return {(sample.name, sample.labels["engine"]): sample.value for sample in samples}


def test_numbers_of_all_workers_are_added_up_per_engine(folder: Path) -> None:
    first, second = Numbers("0-0", 0, 100, 400, 1000), Numbers("0-1", 0, 50, 200, 990)
    Numbers("1-0", 1, 10, 20, 30)
    first.count(failed=False)
    first.count(failed=True)
    second.count(failed=False)
    found = collected(folder)
    assert found["kvcompress_kv_bytes_per_token", "0"] == 150
    assert found["kvcompress_compression_ratio", "0"] == 4.0
    assert found["kvcompress_capacity_tokens", "0"] == 990
    assert found["kvcompress_sentinel_checks_total", "0"] == 3
    assert found["kvcompress_sentinel_failures_total", "0"] == 1
    assert found["kvcompress_capacity_tokens", "1"] == 30
    assert found["kvcompress_sentinel_failures_total", "1"] == 0


def test_nothing_is_claimed_before_a_worker_has_started(folder: Path) -> None:
    assert collected(folder) == {}


def test_workers_write_nothing_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    Numbers("0-0", 0, 1, 2, 3).count(failed=True)
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path / "gone"))
    Numbers("0-0", 0, 1, 2, 3).count(failed=True)
    assert not list(tmp_path.iterdir())
