"""docs/support-matrix.md, written from what the tests found and read back by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.support_matrix.features import FEATURES, REFUSED
from tests.e2e.support_matrix.methods import METHODS

COMMITTED = Path(__file__).parents[3] / "docs" / "support-matrix.md"
YES = "yes"

Cells = dict[tuple[str, str], str]
"""By method and feature: `YES`, or the reason for refusing."""

HEAD = """\
# What works with what

Written by the tests it reports, with vLLM 0.32 on CPU; do not edit:

    pytest tests/e2e/test_support_matrix.py --support-matrix docs/support-matrix.md

`yes`: the row's test, with the column's method in brackets, passed: `test_prefix_caching[gear]`, for example. A number:
refused for the reason below, as `test_refused[METHOD-FEATURE]` sees.
"""
NOTES = """\
## Notes

- Tokens are compared with the transformers path of the same checkpoint, in float32.
- `xkv` attends the tokens of a step as they are and all earlier ones as stored, so with a lossy encoding an answer
  depends on how its prompt is cut into steps (by chunks, prefix hits, preemption and drafts). Its column is a recipe
  that stores 16 bits at full rank, where that makes no difference. `test_vllm_shared.py` and
  `test_vllm_long_parity.py` compare lossy ones, with both sides cutting prompts alike.
- Nothing here has been run on CUDA.
"""


def render(cells: Mapping[tuple[str, str], str], shown: Mapping[str, str]) -> str:
    """The page.

    Args:
        shown: what each test sees, by its name.
    """
    reasons: list[str] = []
    lines = [HEAD]
    lines.append("| feature | test | " + " | ".join(f"`{method}`" for method in METHODS) + " |")
    lines.append("| --- | --- |" + " :-: |" * len(METHODS))
    for feature, title in FEATURES.items():
        served = any((method, feature) not in REFUSED for method in METHODS)
        row = [title, f"`test_{feature}`" if served else "`test_refused`"]
        for method in METHODS:
            found = cells[method, feature]
            if found != YES and found not in reasons:
                reasons.append(found)
            row.append(found if found == YES else f"{reasons.index(found) + 1}")
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Refused, in the server's words:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    lines += ["", "## What each test sees", ""]
    lines += [f"- `{test}`: {words}" for test, words in shown.items()]
    lines += ["", "## Recipes", ""]
    lines += [f"- `{name}`: " + ", ".join(f"`{stage}`" for stage in method.stages) for name, method in METHODS.items()]
    return "\n".join([*lines, "", NOTES])


def read(text: str) -> Cells:
    """The cells of a page that `render` has written."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    head, _, *rows = [[word.strip() for word in line.strip("|").split("|")] for line in table]
    methods, features = [name.strip("`") for name in head[2:]], {title: name for name, title in FEATURES.items()}
    return {
        (method, features[title]): found if found == YES else reasons[found]
        for title, _, *results in rows
        for method, found in zip(methods, results, strict=True)
    }
