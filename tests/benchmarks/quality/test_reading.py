"""Tables and sentences say what the figures say."""

from __future__ import annotations

from typing import Any

from quality import reading, table


def row(name: str, ours: bool, ratio: float, kl: float, long: float | None = None) -> dict[str, Any]:
    def at(value: float) -> dict[str, Any]:
        return {
            "ratio": ratio,
            "kl": value,
            "kl_99": 10 * value,
            "kl_999": 20 * value,
            "kl_quarters": [value] * 4,
            "same_top": 90.0,
            "perplexity": 15.0,
            "base_perplexity": 14.0,
        }

    lengths = {"1024": at(kl)} | ({"4096": at(long)} if long is not None else {})
    return {"name": name, "ours": ours, "lengths": lengths}


RESULTS = {
    "model": "M",
    "note": "",
    "windows": [{"kind": "prose", "tokens": 1024}, {"kind": "prose", "tokens": 1024}, {"kind": "code", "tokens": 4096}],
    "rows": [
        row("small", True, 8.0, 2.0),
        row("half", True, 2.0, 0.002, 0.003),
        row("quarter", True, 4.0, 0.1, 0.2),
        row("eighth bits", False, 2.0, 0.01, 0.01),
        row("four bits", False, 3.75, 0.05, 0.05),
        row("three bits", False, 5.0, 0.2, 0.2),
    ],
}


def test_a_rival_is_as_small_or_a_tenth_larger() -> None:
    half, quarter, small = reading.sentences(RESULTS, "1024")
    assert half.startswith("`half` (2.00x, KL 0.0020)")
    assert "is eighth bits (2.00x, KL 0.010), with 5.0 times its KL" in half
    assert quarter == "`quarter` (4.00x, KL 0.100): **loses** to four bits (3.75x, KL 0.050): 2.0 times its KL."
    smallest = "three bits (5.00x, KL 0.200)"
    assert small == f"`small` (8.00x, KL 2.00): no peer here is as small; the smallest is {smallest}."


def test_close_figures_are_even() -> None:
    rows = [row("ours", True, 4.0, 0.052), row("peer", False, 4.0, 0.05)]
    [said] = reading.sentences({"rows": rows}, "1024")
    assert "even with peer" in said


def test_tables_go_by_size_and_leave_out_what_was_not_measured() -> None:
    assert table.lengths(RESULTS) == ["1024", "4096"]
    lines = table.overview(RESULTS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| **`half`**",
        "| eighth bits",
        "| four bits",
        "| **`quarter`**",
        "| three bits",
        "| **`small`**",
    ]
    assert lines[2].endswith("| 2.00, 0.0030 |")
    assert lines[-1].endswith("| - |")
    assert len({line.count("|") for line in lines}) == 1
    assert "**`small`**" not in table.markdown(RESULTS, "4096")
    assert table.title(RESULTS, "1024") == "windows of 1,024 tokens (2 of prose); base perplexity 14.00"
