"""Inputs damaged at random, 300 of them: each is compressed as it should be, or refused in one line; never a traceback,
never a folder that is half written. A damage that fails has its number, by which `damaged` makes it again.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.verify import verify
from tests import tiny
from tests.command import Run

NUMBER = 60
"""Of each kind."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 1.5, 1e308, float("nan"), float("inf"), "", "x", "1e-6",
    "\0", "\u2028", "\ud800", [], [None], [1, "a"], [[1]], {}, {"a": 1}, {"type": "x"}, "a" * 3000,
)  # fmt: skip

ODD_YAML = (
    "", "x", "-1", ".inf", ".nan", "[1", "{k: 3}", "!!python/object:os.x", "1e99", "&a [*a]", "*b", "2020-01-01",
    "0x10",
)  # fmt: skip

ROWS = [
    {"text": "the cat sat on the mat and the rat ran " * 4},
    {"input_ids": [5, 6, 7, 8] * 12},
    {"messages": [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "on the mat " * 9}]},
] * 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that one command needs."""
    folder = tmp_path_factory.mktemp("sound")
    tiny.save_model(
        folder / "model", vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    tiny.save_tokenizer(folder / "model")
    (folder / "recipe.yaml").write_text(
        "version: 1\nstages:\n"
        "  - method: pca\n    metric: attention\n    rank: {k: 1.0, v: 0.5}\n"
        "  - method: scalar\n    bits: {k: 4, v: 2}\n    outliers: 1\n"
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in paths_of(each, (*path, key)))]


def odd_value(value: Any, draw: random.Random) -> Any:
    """The same JSON with one thing in it replaced, or taken out."""
    changed = copy.deepcopy(value)
    *way, last = draw.choice(paths_of(changed)[1:])
    parent = changed
    for key in way:
        parent = parent[key]
    if draw.random() < 0.25:
        del parent[last]
    else:
        parent[last] = draw.choice(ODD)
    return changed


def odd_bytes(raw: bytes, draw: random.Random, end: int | None = None) -> bytes:
    """One to three bytes flipped, inserted or lost, or the rest cut off."""
    changed, end = bytearray(raw), min(end or len(raw), len(raw))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(end)
        what = draw.randrange(4)
        if what == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            changed.insert(at, draw.randrange(256))
        elif what == 2:
            del changed[at]
        elif draw.random() < 0.2:
            del changed[at:]
        end = min(end, len(changed))
        if not end:
            break
    return bytes(changed)


def damage_json(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    if draw.random() < 0.3:
        path.write_bytes(odd_bytes(raw, draw))
    else:
        path.write_text(json.dumps(odd_value(json.loads(raw), draw)))


def damage_config(folder: Path, draw: random.Random) -> None:
    damage_json(folder / "model" / "config.json", draw)


def damage_header(folder: Path, draw: random.Random) -> None:
    path = folder / "model" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if draw.random() < 0.5:
        path.write_bytes(odd_bytes(raw, draw, 8 + length))
        return
    header = json.dumps(odd_value(json.loads(raw[8 : 8 + length]), draw)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def damage_recipe(folder: Path, draw: random.Random) -> None:
    path = folder / "recipe.yaml"
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    what = draw.randrange(5)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[draw.randrange(len(lines))])
    elif what == 2:
        key = lines[at].split(":")[0]
        lines[at] = f"{key}: {draw.choice(ODD_YAML)}"
    elif what == 3:
        lines[at] = " " * draw.randrange(6) + lines[at].strip()
    else:
        path.write_bytes(odd_bytes(path.read_bytes(), draw))
        return
    path.write_text("\n".join(lines) + "\n")


def damage_tokenizer(folder: Path, draw: random.Random) -> None:
    path = folder / "model" / draw.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    if draw.random() < 0.05:
        path.unlink()
    else:
        damage_json(path, draw)


def damage_rows(folder: Path, draw: random.Random) -> None:
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    if draw.random() < 0.3:
        path.write_bytes(odd_bytes(path.read_bytes(), draw))
        return
    lines[at] = json.dumps(odd_value(json.loads(lines[at]), draw))
    path.write_text("\n".join(lines) + "\n")


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "config": damage_config,
    "header": damage_header,
    "recipe": damage_recipe,
    "tokenizer": damage_tokenizer,
    "rows": damage_rows,
}


def damaged(kind: str, number: int, sound: Path, folder: Path) -> Path:
    shutil.copytree(sound, folder)
    KINDS[kind](folder, random.Random(f"{kind} {number}"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_right_or_one_line(kind: str, sound: Path, run: Run, tmp_path: Path) -> None:
    wrong: list[str] = []
    for number in range(NUMBER):
        folder = damaged(kind, number, sound, tmp_path / "case")
        out = tmp_path / "out"
        code, _, stderr = run(
            "compress", folder / "model", "--recipe", folder / "recipe.yaml", "--out", out,
            "--calibration", folder / "rows.jsonl", "--samples", 2, "--length", 16,
        )  # fmt: skip
        last = (stderr.strip().splitlines() or [""])[-1]
        refused = code == 2 and last.startswith("error: ") and "error: unexpected" not in last and not out.exists()
        if "Traceback" in stderr or not (refused or (code == 0 and verify(out).ok)):
            wrong.append(f"{kind} {number}: exit code {code}, {last}")
        for left in (folder, out, tmp_path / "out.partial"):
            shutil.rmtree(left, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
