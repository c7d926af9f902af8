"""The report: complete, self-contained, and it shows the numbers it was given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval.report import markdown_table, render, write_report
from kvcompress_eval.report.axes import Scale
from kvcompress_eval.report.wording import verdict_sentence
from kvcompress_eval.scores import Settings, compared, with_verdicts

VOID = {"meta", "br", "link", "img"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def parse(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", " ".join(parse(html).text)).replace("\N{MINUS SIGN}", "-")


@pytest.fixture
def results() -> dict[str, Any]:
    """A base, a good candidate and a bad one, on 400 samples of one task."""
    base = [1.0] * 380 + [0.0] * 20
    bad = [0.0] * 40 + base[40:]
    scores = {"base": base, "good": base, "b<a>d": bad}
    settings = Settings(margin=1.0, seed=0)
    rows = {name: compared(values, None if name == "base" else base, settings) for name, values in scores.items()}
    with_verdicts(list(rows.values()))
    layers = [{"index": at, "both": 0.1, "k": 0.0625 + at / 100, "v": 0.25 if at else None} for at in range(3)]
    return {
        "models": [
            {
                "name": name,
                "path": f"models/{name}",
                "role": "baseline" if name == "base" else "candidate",
                "bytes_per_token": size,
                "manifest_sha256": None if name == "base" else "ab" * 32,
                "recipe": None if name == "base" else {"version": 1},
                "layers": [] if name == "base" else layers,
            }
            for name, size in (("base", 4096), ("good", 1024), ("b<a>d", 512))
        ],
        "overall": [{"model": name, **row} for name, row in rows.items()],
        "tasks": [
            {"task": "vt", "length": 2048, "model": name, "mean_length": 2000.0, **row} for name, row in rows.items()
        ],
        "skipped": [{"task": "cwe", "length": 2048, "reason": "too short: because"}],
        "perplexity": {
            "text": {"name": "held.txt", "sha256": "cd" * 32},
            "window": 1024,
            "stride": 512,
            "models": [
                {"model": "base", "perplexity": 5.25},
                {"model": "good", "perplexity": 5.355, "increase": 0.02},
            ],
        },
        "agreement": {
            "baseline": "base",
            "models": [
                {
                    "model": "good",
                    "text": {"top1": 0.975, "kl": 0.0123},
                    "tasks": {"top1": 0.99, "kl": None},
                    "divergence": {"prompts": 8, "identical": 0.75},
                }
            ],
        },
        "serving": {
            "engine": "vllm",
            "context_tokens": 4096,
            "models": [{"model": "good", "capacity_tokens_reported": 123456, "decode_tokens_per_s": 45.67}],
        },
        "margin": 1.0,
        "environment": {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "accelerator": None},
        "seed": 42,
    }


def test_report_holds_every_number(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path / "deep/report.html")
    html = (tmp_path / "deep/report.html").read_text("utf-8")
    text = text_of(html)
    for expected in (
        "95.0 [92.4, 96.7]",
        "-10.0 [-13.3, -7.4]",
        "4,096",
        "1,024 (4.00x smaller)",
        "512 (8.00x smaller)",
        "5.250",
        "5.355 (+2.00 %)",
        "97.5 %, KL 0.0123",
        "75 % of 8",
        "123,456",
        "45.7",
        "after 4,096 tokens",
        "cwe at 2,048 tokens: too short: because",
        "Not worse than the base model by more than 1 point (95 % confidence, 400 paired samples).",
        "Worse than the base model by more than 1 point",
        "ab" * 32,
        "cd" * 32,
        "torch 2.13.0",
        "b<a>d",
    ):
        assert expected in text, expected


def test_report_needs_no_network_and_no_script(results: dict[str, Any]) -> None:
    html = render(results)
    assert not re.search(r"https?://|src=|@import|url\(", html)
    seen = parse(html).seen
    assert {"script", "link", "img", "iframe"}.isdisjoint(seen)
    assert seen.count("svg") == 2 + 2, "two plots, and one interval for each candidate's task"
    assert 'name="viewport"' in html
    assert "<a>" not in html, "names are escaped"


def test_points_stand_where_their_numbers_say(results: dict[str, Any]) -> None:
    html = render(results)
    found = re.findall(r'<circle class="dot[^"]*" cx="([\d.]+)" cy="([\d.]+)" r="5.5"><title>([^:]+):', html)
    points = {name: (float(x), float(y)) for x, y, name in found}
    assert set(points) == {"base", "good", "b&lt;a&gt;d"}
    assert points["b&lt;a&gt;d"][0] < points["good"][0] < points["base"][0]
    assert points["good"][1] == points["base"][1] < points["b&lt;a&gt;d"][1], "up is a higher score"
    zero = 52
    assert (points["base"][0] - zero) / (points["good"][0] - zero) == pytest.approx(4, rel=0.01)


def test_a_single_model_needs_no_comparison(results: dict[str, Any]) -> None:
    alone = json.loads(json.dumps(results))
    alone["models"] = alone["models"][:1]
    alone["overall"], alone["tasks"] = alone["overall"][:1], alone["tasks"][:1]
    alone["perplexity"], alone["agreement"], alone["serving"], alone["skipped"] = {}, {}, {}, []
    text = text_of(render(alone))
    assert "base, measured" in text
    assert "verdict" not in text
    assert "95.0 [92.4, 96.7]" in text


def test_a_suite_without_tasks_is_reported(results: dict[str, Any]) -> None:
    results["overall"], results["tasks"] = [], []
    assert "5.355 (+2.00 %)" in text_of(render(results))
    assert "Verdict" not in markdown_table(results)


def test_markdown_table(results: dict[str, Any]) -> None:
    lines = markdown_table(results, tasks=True).splitlines()
    assert lines[0] == "|  | base (base) | good | b<a>d |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert "| KV cache, bytes per token | 4,096 | 1,024 (4.00x smaller) | 512 (8.00x smaller) |" in lines
    assert "| Perplexity | 5.250 | 5.355 (+2.00 %) | - |" in lines
    assert "| vt, 2,048 tokens | 95.0 [92.4, 96.7] | 95.0 (+0.0 [-1.0, +1.0]) | 85.0 (-10.0 [-13.3, -7.4]) |" in lines
    assert lines[-1] == "| Verdict at 1 point, 95 % | - | not worse | worse |"
    assert len({line.count("|") for line in lines}) == 1


def test_undecided_says_what_is_open() -> None:
    row = {"delta_ci95": [-2.5, 0.25], "verdict": "undecided", "n": 60}
    assert "between -2.5 and +0.2 points" in verdict_sentence(row, 1.0)
    row["delta_ci95"] = [-2.5, -0.5]
    assert "between a loss of 2.5 and a loss of 0.5 points" in verdict_sentence(row, 2.0)


def test_scales_have_round_ticks() -> None:
    assert Scale(0, 10, 0, 100).ticks() == [0, 2, 4, 6, 8, 10]
    assert Scale(81.2, 88.9, 0, 1).ticks() == [82, 84, 86, 88]
    assert Scale(0, 10, 50, 250)(5) == 150


def test_labels_do_not_cover_each_other() -> None:
    texts = _labels([(100.0, 100.0, "one"), (104.0, 101.0, "two"), (102.0, 99.0, "three")])
    heights = sorted(float(found.group(1)) for text in texts if (found := re.search(r' y="([\d.]+)"', text)))
    assert len(heights) == 3
    assert all(b - a >= 13 for a, b in pairwise(heights))
