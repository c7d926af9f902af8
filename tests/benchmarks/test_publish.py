"""README.md shows what the newest result files hold."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_newest_results(publish: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert publish.with_tables(text) == text, "run benchmarks/publish.py"


def test_a_new_result_changes_its_table_only(
    publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in publish.RESULTS.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    newest = max(results.glob("*-demo.json"))
    (results / "9999-01-01-later-demo.json").write_text(newest.read_text().replace("reference-model", "other-model"))
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", results)
    before = (ROOT / "README.md").read_text()
    after = publish.with_tables(before)
    assert "other-model" in after
    assert "[9999-01-01-later-demo.json](benchmarks/results/9999-01-01-later-demo.json)" in after
    for apart in ("<!-- demo:begin -->", "<!-- demo:end -->"):
        side = 0 if "begin" in apart else -1
        assert after.split(apart)[side] == before.split(apart)[side]
