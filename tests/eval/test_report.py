"""The report: complete, self-contained, and it shows the numbers it was given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval.report import markdown_table, render, write_report, write_table
from kvcompress_eval.report.axes import Scale
from kvcompress_eval.report.heat import FULL_SHADE, depth_maps, task_map
from kvcompress_eval.report.labels import overlap, place
from kvcompress_eval.report.plots import Line, Point, drift, front
from kvcompress_eval.report.wording import verdict_sentence
from kvcompress_eval.scores import Settings, compared, multiplicity, with_verdicts

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
    """A base, a good candidate and a bad one, on 600 samples of one task."""
    base = [1.0] * 570 + [0.0] * 30
    bad = [0.0] * 60 + base[60:]
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
        "multiplicity": multiplicity([*rows.values()], [*rows.values()]),
        "noise_floor": {
            "model": "base",
            "seeds": [42, 43],
            "overall": {"scores": [95.0, 93.5], "delta": -1.5, "ci95": [-4.75, 1.5]},
            "rms": 2.25,
            "tasks": [{"task": "vt", "length": 2048, "scores": [95.0, 92.75], "delta": -2.25}],
        },
        "depths": [
            {"task": "niah", "length": 2048, "model": name, "depth": depth, "score": score, "n": 8}
            for name in scores
            for depth, score in ((0, 100.0), (50, 37.5))
        ],
        "drift": {
            "source": "decoded tokens",
            "models": [
                {
                    "model": "good",
                    "points": [
                        {"position": at, "tokens": 64, "kl": 0.001 * (at + 1), "top1": 0.99} for at in (0, 64, 128)
                    ],
                }
            ],
        },
        "skipped": [{"task": "cwe", "length": 2048, "reason": "too short: because"}],
        "perplexity": {
            "texts": [
                {"kind": "prose", "name": "held.txt", "sha256": "cd" * 32},
                {"kind": "code", "name": "code.txt", "sha256": "ef" * 32},
            ],
            "window": 1024,
            "stride": 512,
            "models": [
                {
                    "model": "base",
                    "perplexity": 5.25,
                    "tokens": 2000,
                    "kinds": [{"kind": "prose", "perplexity": 7.5}, {"kind": "code", "perplexity": 3.125}],
                },
                {
                    "model": "good",
                    "perplexity": 5.355,
                    "tokens": 2000,
                    "increase": 0.02,
                    "kinds": [
                        {"kind": "prose", "perplexity": 7.5375, "increase": 0.005},
                        {"kind": "code", "perplexity": 3.25, "increase": 0.04},
                    ],
                },
            ],
        },
        "agreement": {
            "baseline": "base",
            "models": [
                {
                    "model": "good",
                    "text": {
                        "top1": 0.975,
                        "kl": 0.0123,
                        "kl_p99": 0.25,
                        "kl_p999": 0.8125,
                        "kl_tokens": 2000,
                        "kinds": [
                            {"kind": "prose", "top1": 0.98, "kl": 0.0111, "kl_p99": 0.2, "kl_p999": 0.4375},
                            {"kind": "code", "top1": 0.97, "kl": 0.0222, "kl_p99": 0.3, "kl_p999": 0.9375},
                        ],
                    },
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
        "environment": {
            "engine": "vllm",
            "text_engine": "transformers",
            "computed_in": "float32",
            "minutes": 3.25,
            "template": "chat",
            "dtype": "auto",
            "python": "3.11.7",
            "packages": {"torch": "2.13.0"},
            "accelerator": None,
        },
        "seed": 42,
    }


def test_report_holds_every_number(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path / "deep/report.html")
    html = (tmp_path / "deep/report.html").read_text("utf-8")
    text = text_of(html)
    for expected in (
        "95.0 [93.0, 96.5]",
        "-10.0 [-12.7, -7.8]",
        "4,096",
        "1,024 (4.00x smaller)",
        "512 (8.00x smaller)",
        "5.250",
        "5.355 (+2.00 %)",
        "97.5 %",
        "0.0123, 0.250, 0.812",
        "KL divergence on text 0.012 nats, 99.9 %: 0.81 nats (the 2 largest of 2,000 tokens).",
        "7.537 (+0.50 %); KL 0.0111, 0.200, 0.438",
        "1 task, 600 samples at 2,048 tokens (template chat); 2,000 tokens of text (2 kinds); engines vllm (tasks) and "
        "transformers (text), float32, 3.2 minutes.",
        "ef" * 32,
        "75 % of 8",
        "123,456",
        "45.7",
        "after 4,096 tokens",
        "cwe at 2,048 tokens: too short: because",
        "Not worse than the base model by more than 1 point (95 % confidence for all 2 verdicts together, 600 paired",
        "Worse than the base model: it loses 7.8 to 12.7 points (95 %",
        "-2.2 on other prompts",
        "decoded tokens",
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
    assert seen.count("svg") == 3 + 2, "three plots, and one interval for each candidate's task"
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
    alone["noise_floor"], alone["drift"], alone["depths"] = {}, {}, []
    alone["multiplicity"]["overall"] = 0
    alone["perplexity"], alone["agreement"], alone["serving"], alone["skipped"] = {}, {}, {}, []
    text = text_of(render(alone))
    assert "base, measured" in text
    assert "verdict" not in text
    assert "95.0 [93.0, 96.5]" in text


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
    assert "| vt, 2,048 tokens | 95.0 [93.0, 96.5] | 95.0 (+0.0 [-0.6, +0.6]) | 85.0 (-10.0 [-12.7, -7.8]) |" in lines
    assert lines[-1] == "| Verdict at 1 point, 95 % | - | not worse | worse |"
    assert len({line.count("|") for line in lines}) == 1


def test_undecided_says_what_is_open() -> None:
    row = {"delta_ci95": [-2.5, 0.25], "verdict": "undecided", "n": 60}
    assert "lies between -2.5 and +0.2 points" in verdict_sentence(row, 1.0)
    assert "More samples narrow this" in verdict_sentence(row, 1.0, family=3)
    row["delta_ci95"] = [-0.75, 0.25]
    assert "On its own this would be 'not worse'; beside 2 others" in verdict_sentence(row, 1.0, family=3)
    row["delta_ci95"] = [-2.5, -0.5]
    assert "between a loss of 2.5 and a loss of 0.5 points" in verdict_sentence(row, 2.0, family=3)
    assert "On its own this would be 'worse'" in verdict_sentence(row, 2.0, family=3)


def test_worse_says_whether_the_margin_is_exceeded() -> None:
    row = {"delta_ci95": [-6.0, -0.5], "verdict": "worse", "n": 60}
    assert "loses 0.5 to 6.0 points; whether it stays within 1 point is open (95 % confidence," in verdict_sentence(
        row, 1.0
    )
    row["delta_ci95"] = [-6.0, -1.5]
    assert "loses 1.5 to 6.0 points (95 % confidence" in verdict_sentence(row, 1.0)


def test_scales_have_round_ticks() -> None:
    assert Scale(0, 10, 0, 100).ticks() == [0, 2, 4, 6, 8, 10]
    assert Scale(81.2, 88.9, 0, 1).ticks() == [82, 84, 86, 88]
    assert Scale(0, 10, 50, 250)(5) == 150


def test_labels_do_not_cover_each_other_or_a_point() -> None:
    points = [(100.0 + 4 * at, 100.0 + at % 3, f"a longer name {at}") for at in range(6)]
    labels = place(points)
    assert {label.name for label in labels} == {name for _, _, name in points}
    for at, label in enumerate(labels):
        assert not any(overlap(label.box, other.box) for other in labels[at + 1 :])
        assert not any(overlap(label.box, (x - 5, y - 5, x + 5, y + 5)) for x, y, _ in points)


def test_the_front_is_what_no_other_model_beats() -> None:
    def point(name: str, x: float, y: float) -> Point:
        return Point(name, 0, x, y, y, y, False)

    points = [point("base", 4096, 92), point("good", 1024, 91), point("bad", 1024, 80), point("small", 512, 60)]
    points += [point("large and bad", 2048, 85), point("equal", 2048, 91)]
    assert [item.name for item in front(points)] == ["small", "good", "base"]


def test_a_logarithmic_scale_has_powers_of_ten() -> None:
    scale = Scale(0.0005, 0.2, 100, 0, log=True)
    assert scale.ticks() == [0.001, 0.01, 0.1]
    assert scale(0.01) == pytest.approx(50, abs=1e-9)
    assert Scale(0.002, 0.005, 0, 1, log=True).ticks() == [0.002, 0.005]


def test_task_map_shades_what_was_lost(results: dict[str, Any]) -> None:
    found = task_map(results)
    assert found is not None
    assert found.columns == ["base", "good", "b<a>d"]
    [(task, length, cells)] = found.rows
    assert (task, length) == ("vt", "2,048 tokens")
    assert [cell.text for cell in cells] == ["95", "95", "85"]
    assert [cell.shade for cell in cells] == pytest.approx([0, 0, 100 * 10 / FULL_SHADE], abs=0.05)


def test_depth_maps_shade_what_was_missed(results: dict[str, Any]) -> None:
    results["depths"].append({"task": "niah", "length": 4096, "model": "good", "depth": 100, "score": 0.0, "n": 1})
    maps = depth_maps(results)
    assert [found.name for found in maps] == ["base", "good", "b<a>d"]
    assert maps[0].columns == ["0", "50", "100"]
    assert [[cell.text for cell in cells] for _, _, cells in maps[1].rows] == [["100", "38", ""], ["", "", "0"]]
    assert [cell.shade for cell in maps[1].rows[0][2]] == [0, 62.5, 0]
    assert "37.5 over 8 samples" in maps[1].rows[0][2][1].title


def test_a_curve_of_an_exact_codec_has_no_logarithm() -> None:
    exact = Line(1, False, [0.0, 0.0], [0, 64])
    assert drift([exact], 128) == ""
    assert drift([exact, Line(2, False, [0.0, 0.01], [0, 64])], 128).count("<circle") == 1


def test_the_headline_is_the_verdict(results: dict[str, Any]) -> None:
    assert "1 of 2 are not worse than base; the smallest is good, with a cache 4.0 times smaller" in text_of(
        render(results)
    )
    for row in results["overall"]:
        row["verdict"] = row["verdict"] and "worse"
    assert "2 candidates against base: 2 worse" in text_of(render(results))
    results["models"], results["overall"] = results["models"][:2], results["overall"][:2]
    results["tasks"], results["depths"] = results["tasks"][:2], []
    assert "good against base: a KV cache 4.0 times smaller" in text_of(render(results))


def test_table_file_says_what_it_rests_on(results: dict[str, Any], tmp_path: Path) -> None:
    write_table(results, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text("utf-8")
    assert text.startswith(markdown_table(results, tasks=True))
    assert "1 task at 2,048 tokens, 600 samples in all, seed 42, engine vllm, float32." in text
    assert "any of the 2 over all tasks is wrong is at most 5 %" in text
    assert "seed 43 against seed 42, differs by -1.5 points [-4.8, +1.5] overall and by 2.2 points per task" in text
    assert f"`{'ab' * 32}` (good)" in text
