"""The loop on a student that can be seen through: a table of logits per token."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kvcompress.calibration.corpus import Calibration
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.training import distributed
from kvcompress.training.distill import Schedule, distill, loss
from kvcompress.training.state import StateFile

ROOT = Path(__file__).parents[2]
VOCABULARY = 12


def data(samples: int = 10, length: int = 16) -> Calibration:
    tokens = np.random.Generator(np.random.PCG64(0)).integers(0, VOCABULARY, (samples, length))
    return Calibration("random", tokens, np.zeros(samples, dtype=np.int64))


def schedule(**changes: Any) -> Schedule:
    return Schedule(**{"steps": 40, "batch": 4, "learning_rate": 0.1, "kl_weight": 1.0, "seed": 0} | changes)


def tables() -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    return teacher, nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))


def train(how: Schedule, state: StateFile | None = None, progress: Any = None) -> tuple[list[float], Tensor]:
    """Loss before and after, and the trained table."""
    teacher, student = tables()
    tokens = torch.from_numpy(data().tokens_NT)

    def measured() -> float:
        with torch.no_grad():
            return float(loss(teacher[tokens], student[tokens], tokens, how.kl_weight))

    before = measured()
    distill(
        lambda tokens_BT, _: teacher[tokens_BT],
        lambda tokens_BT, _: student[tokens_BT],
        {"table": student},
        data(),
        how,
        state=state,
        progress=progress,
    )
    return [before, measured()], student.detach()


def test_student_comes_to_the_teacher() -> None:
    (before, after), _ = train(schedule())
    assert before > 0.5
    assert after < 0.05 * before


def test_loss_is_the_weighted_sum_of_the_textbook_terms() -> None:
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    divergence = nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    entropy = nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = 0.25 * divergence.mean() + 0.75 * entropy
    torch.testing.assert_close(loss(teacher, student, tokens, 0.25), expected)
    assert float(loss(teacher, teacher, tokens, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_micro_batches_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(schedule(batch=5))[1]
    monkeypatch.setattr("kvcompress.training.distill.MICRO_TOKENS", 32)
    torch.testing.assert_close(train(schedule(batch=5))[1], whole, atol=1e-5, rtol=0)


def test_every_sample_is_seen_once_per_pass_in_an_order_that_the_seed_decides() -> None:
    how = schedule(batch=4)
    seen = [index for step in range(5) for index in how.indices(step, 10)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    assert schedule(seed=1).indices(0, 10) != how.indices(0, 10)


def test_rate_warms_up_and_falls_to_zero() -> None:
    rates = [schedule(steps=100).rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[-1] < 1e-3 * 0.1


@pytest.mark.parametrize(
    ("finite", "advice"),
    [(0, "not finite before anything was trained.* --dtype"), (3, "training diverged at step 3; lower learning_rate")],
)
def test_divergence_stops_with_advice(finite: int, advice: str) -> None:
    teacher, student = tables()
    factors = iter([1.0] * finite + [float("nan")])
    with pytest.raises(ValueError, match=advice):
        distill(
            lambda tokens, _: teacher[tokens] * next(factors),
            lambda tokens, _: student[tokens],
            {"table": student},
            data(),
            schedule(),
        )


@pytest.mark.parametrize("stop", [3, 10, 11, 39])
def test_resumed_training_is_bit_identical(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompress.training.distill.SAVE_EVERY", 10)
    whole = train(schedule())[1]

    def interrupt(_: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WorkDir.open(tmp_path / "out", {}) as work:
        train(schedule(), StateFile(work, "unit:training", "data"), interrupt)
    steps: list[int] = []
    with WorkDir.open(tmp_path / "out", {}, resume=True) as work:
        state = StateFile(work, "unit:training", "data")
        resumed = train(schedule(), state, lambda _, done, total: steps.append(done))[1]
        assert len(list(work.scratch("x").parent.glob("unit-training-*"))) == 1
        assert StateFile(work, "unit:training", "other data").load() is None
    assert steps[0] == stop // 10 * 10
    assert torch.equal(resumed, whole)


@pytest.mark.e2e
def test_two_processes_give_the_result_of_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=dict(os.environ) | address | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    one = train(schedule())[1]
    for output in outputs:
        torch.testing.assert_close(torch.tensor(json.loads(output)), one, atol=1e-5, rtol=0)


def show(how: Schedule) -> None:
    print(json.dumps(train(how)[1].tolist()), flush=True)


if __name__ == "__main__":
    if distributed.rank() == 0:
        from tests.training.test_distill import show as on_every_rank

        with distributed.leading():
            distributed.everywhere(on_every_rank, schedule())
    else:
        distributed.follow()
