"""The comparison as a table, for a terminal and for Markdown; one per length of windows."""

from __future__ import annotations

from typing import Any

HEADS = ("cache", "x", "KL", "99 %", "99.9 %", "by quarter", "same top", "perplexity")


def lengths(results: dict[str, Any]) -> list[str]:
    """Lengths of windows that were measured, ascending."""
    return sorted({length for row in results["rows"] for length in row["lengths"]}, key=int)


def cells(results: dict[str, Any], length: str) -> list[tuple[dict[str, Any], list[str]]]:
    """Rows of one length and what their cells say, by bytes, the largest cache first."""
    rows = [row for row in results["rows"] if length in row["lengths"]]
    rows.sort(key=lambda row: (row["lengths"][length]["ratio"], row["lengths"][length]["kl"]))
    return [(row, _cells(row["name"], row["lengths"][length])) for row in rows]


def _cells(name: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{found['ratio']:.2f}",
        kl(found["kl"]),
        kl(found["kl_99"]),
        kl(found["kl_999"]),
        " ".join(map(kl, found["kl_quarters"])),
        f"{found['same_top']:.1f}",
        f"{found['perplexity']:.2f}",
    ]


def kl(value: float) -> str:
    """A divergence with as many digits as it has meaning."""
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def title(results: dict[str, Any], length: str) -> str:
    """What a table was measured on, with the base's perplexity."""
    kinds: dict[str, int] = {}
    for window in results["windows"]:
        if str(window["tokens"]) == length:
            kinds[window["kind"]] = kinds.get(window["kind"], 0) + 1
    counted = ", ".join(kind if count == 1 else f"{count} of {kind}" for kind, count in kinds.items())
    base = next(row["lengths"][length] for row in results["rows"] if length in row["lengths"])["base_perplexity"]
    note = f"; {results['note']}" if results["note"] else ""
    return f"windows of {int(length):,} tokens ({counted}); base perplexity {base:.2f}{note}"


def markdown(results: dict[str, Any], length: str) -> str:
    """One table; our rows stand out."""
    lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
    for row, (name, *rest) in cells(results, length):
        lines.append(f"| {' | '.join([f'**`{name}`**' if row['ours'] else name, *rest])} |")
    return "\n".join(lines)


def overview(results: dict[str, Any]) -> str:
    """One table: the shortest windows in full, of longer ones the size and the KL."""
    first, *longer = lengths(results)
    heads = [*(head for head in HEADS if head != "by quarter"), *(f"at {int(length):,}: x, KL" for length in longer)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row, (name, *rest) in cells(results, first):
        del rest[HEADS.index("by quarter") - 1]
        for length in longer:
            found = row["lengths"].get(length)
            rest.append("-" if found is None else f"{found['ratio']:.2f}, {kl(found['kl'])}")
        lines.append(f"| {' | '.join([f'**`{name}`**' if row['ours'] else name, *rest])} |")
    return "\n".join(lines)


def show(results: dict[str, Any]) -> None:
    """Print every table."""
    from kvcompress_cli.show import table

    for length in lengths(results):
        rows = [[f"* {name}" if row["ours"] else name, *rest] for row, (name, *rest) in cells(results, length)]
        table(f"\n{results['model']}, {title(results, length)}; * ours", HEADS, rows)
