"""A pytest plug-in: `--support-matrix FILE` writes the matrix from the cells that its tests reported."""

from __future__ import annotations

from pathlib import Path

import pytest

PROPERTY = "support-matrix"
"""Tests report a cell as this property: method, feature and result."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-matrix", metavar="FILE", help="write what vLLM features work to this file")


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist send their reports to the process that has none of its own.
    target = config.getoption("--support-matrix")
    if target and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(Path(target)))


@pytest.hookimpl(tryfirst=True)  # before markers are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one method next to each other: they share engines, and a worker gets a run of neighbours."""
    places = [place for place, item in enumerate(items) if _is_cell(item)]
    for place in places:
        items[place].add_marker("slow")
    ordered = sorted((items[place] for place in places), key=lambda item: item.callspec.params["case"])  # type: ignore[attr-defined]
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _is_cell(item: pytest.Item) -> bool:
    return item.path.name == "test_support_matrix.py" and hasattr(item, "callspec")


class Collector:
    def __init__(self, target: Path) -> None:
        self.target = target
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == PROPERTY:
                    method, feature, result = value
                    self.cells[method, feature] = result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from tests.e2e import test_support_matrix
        from tests.e2e.support_matrix import features, table

        missing = sorted(features.CELLS - set(self.cells))
        if missing:
            terminalreporter.line(f"{self.target} not written; these cells failed or did not run: {missing}", red=True)
            return
        self.target.write_text(table.render(self.cells, test_support_matrix.shown()))
        terminalreporter.line(f"wrote {self.target}: {len(self.cells)} cells")
