"""docs/real-model.md shows what its result files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import real_page
from quality import table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def real() -> dict[str, Any]:
    evaluation = {"environment": {"cpu": "2 x CPU", "system": "Linux", "python": "3.11", "packages": {"torch": "2.13"}}}
    gib = {"memory_bytes": 2**29, "base": 23301, "compressed": 93206}
    return {
        "model": "SomeModel",
        "seconds": 600,
        "plan": {"balanced": {"bytes_per_token": {"compressed": 5760, "ratio": 4.0}, "capacity_tokens": gib}},
        "eval": evaluation,
        "chat": {
            "question": "Which planet is the largest?",
            "answers": {
                "balanced": {"start_seconds": 31.4, "answer": "Jupiter.\nIt is a gas giant.", "finish": "stop"}
            },
        },
    }


def test_the_page_has_plan_evaluation_answer_and_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        real_page, "markdown_table", lambda results, tasks: f"| evaluated on {results['environment']['cpu']} |"
    )
    peers = json.loads(max(RESULTS.glob("*-peers.json")).read_text())
    page = real_page.page("2026-12-01-machine-real", real(), "2026-12-02-machine-peers", peers)
    assert page.startswith("# SomeModel, compressed\n")
    assert "| `balanced` | 5,760 | 4.00x | 186,412 |" in page
    assert "> Jupiter.\n> It is a gas giant." in page
    assert "2026-12-01" in page
    assert "2026-12-02" in page
    for length in table.lengths(peers):
        assert table.markdown(peers, length) in page
    assert "| evaluated on 2 x CPU |" in page
