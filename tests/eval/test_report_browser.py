"""The report in a real browser: no errors, no requests, readable at a phone's width, in both colour schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval.report import write_report
from kvcompress_eval.report.browser import Page, browse, picture

from tests import require

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-report"

require.need("browser")

PHONE = 390

OVERFLOWING = """
(() => {
  const boxed = element => element.closest(".scroll, pre, svg");
  const edge = document.documentElement.clientWidth + 0.5;
  return [...document.body.querySelectorAll("*")]
    .filter(element => !boxed(element) && element.getBoundingClientRect().right > edge)
    .map(element => element.tagName + "." + element.className);
})()
"""

SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("p, td, th, li, small, h1, h2, summary, .soft")]
  .filter(element => element.textContent.trim() && element.getClientRects().length)
  .map(element => parseFloat(getComputedStyle(element).fontSize)))
"""

COVERED = """
(() => {
  const boxes = [...document.querySelectorAll("#pareto text.label")].map(text => text.getBoundingClientRect());
  return boxes.some((a, at) => boxes.slice(at + 1).some(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4));
})()
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browse() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed example, rendered anew: every part of the report, with eight models."""
    results: dict[str, Any] = json.loads((EXAMPLE / "results.json").read_text("utf-8"))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 768, 1280])
def test_opens_quietly_and_fits(page: Page, report: Path, width: int, dark: bool) -> None:
    page.open(report, width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.complaints() == []
    assert page.requests() == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(SMALLEST_TEXT) >= 11
    assert page.evaluate(COVERED) is False
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue < 3 * 128) == dark


def test_wide_tables_scroll_inside_their_box(page: Page, report: Path) -> None:
    page.open(report, PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth + 20)"
    )
    assert page.evaluate("getComputedStyle(document.querySelector('.heat')).overflowX") == "auto"


def test_every_part_is_drawn(page: Page, report: Path) -> None:
    page.open(report, 1280)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    heights = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.card.verdict, figure, table')].map((part, at) =>"
        " [part.id || part.className || part.tagName + at, part.getBoundingClientRect().height]))"
    )
    assert {"pareto", "drift", "layers", "card verdict open", "card verdict bad"} <= set(heights)
    assert all(height > 20 for height in heights.values()), heights
    first = page.evaluate("document.querySelector('h1').nextElementSibling.getAttribute('aria-label')")
    assert first == "Verdict", "the verdict comes first"


def test_faults_are_noticed(page: Page, tmp_path: Path) -> None:
    """What the other tests look for is seen when it is there."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<meta name="viewport" content="width=device-width">'
        '<body><div style="width:900px">wide</div><p style="font-size:6px">small</p>'
        '<img src="other.png"><script>console.error("broken"); missing()</script></body>'
    )
    page.open(bad, PHONE)
    assert any("broken" in line for line in page.complaints())
    assert any("missing is not defined" in line for line in page.complaints())
    assert any(address.endswith("other.png") for address in page.requests())
    assert page.evaluate(OVERFLOWING) == ["DIV."]
    assert page.evaluate(SMALLEST_TEXT) == 6
    with pytest.raises(ValueError, match="the script failed"):
        page.evaluate("missing()")


def test_a_part_can_be_had_as_a_picture(report: Path, tmp_path: Path) -> None:
    picture(report, tmp_path / "pareto.png", element="#pareto", width=720)
    raw = (tmp_path / "pareto.png").read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = (int.from_bytes(raw[at : at + 4], "big") for at in (16, 20))
    assert 700 <= width <= 1440
    assert 400 <= height <= width


def test_the_example_is_what_its_results_render_to(report: Path) -> None:
    assert (EXAMPLE / "report.html").read_text("utf-8") == report.read_text("utf-8"), "run `make report`"
    assert (EXAMPLE / "report.html").stat().st_size < 2**20
    assert (EXAMPLE / "pareto.png").read_bytes().startswith(b"\x89PNG")
