"""`eval --compare`: which model is the base, and recipes that become checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kvcompress_eval
import pytest
from kvcompress_cli import main
from kvcompress_eval import schema
from kvcompress_eval.candidates import make_checkpoints, split_base
from kvcompress_eval.models import MANIFEST
from kvcompress_eval.suite import Suite

RECIPE = """\
version: 1
stages:
  - method: pca
    metric: none
  - method: scalar
    bits: {bits}
"""


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"bits{bits}.yaml" for bits in (8, 2)]
    for path, bits in zip(paths, (8, 2), strict=True):
        path.write_text(RECIPE.format(bits=bits))
    return [str(path) for path in paths]


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def test_the_first_model_is_the_base_unless_one_is_named(base: Path, recipes: list[str]) -> None:
    assert split_base([str(base), *recipes], None) == (str(base), recipes)
    assert split_base(recipes, str(base)) == (str(base), recipes)
    with pytest.raises(ValueError, match="nothing to compare"):
        split_base([str(base)], None)
    with pytest.raises(ValueError, match="none of them is a checkpoint"):
        split_base(recipes, None)


def test_recipes_become_checkpoints_once_and_name_their_base(
    base: Path, recipes: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    made = make_checkpoints(str(base), recipes, tmp_path / "models", silent)
    assert [Path(path).name for path in made] == ["bits8", "bits2"]
    manifests = [Path(path) / MANIFEST for path in made]
    assert split_base(made, None) == (str(base), made)

    before = [path.stat().st_mtime_ns for path in manifests]
    assert make_checkpoints(str(base), [made[0], recipes[1]], tmp_path / "models", silent) == made
    assert [path.stat().st_mtime_ns for path in manifests] == before

    results = kvcompress_eval.run(made, baseline=base, **options)
    sizes = [model["bytes_per_token"] for model in results["models"]]
    assert sizes[0] > sizes[1] > sizes[2]
    assert [row["verdict"] is not None for row in results["overall"]] == [False, True, True]

    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "bits8.yaml"
    twin.write_text(RECIPE.format(bits=4))
    with pytest.raises(ValueError, match="same file name"):
        make_checkpoints(str(base), [recipes[0], str(twin)], tmp_path / "models", silent)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere)
    other = make_checkpoints(str(elsewhere), recipes[1:], tmp_path / "more", silent)
    with pytest.raises(ValueError, match=r"no base that all share.*elsewhere.*--baseline"):
        split_base([made[0], *other], None)


def test_a_wrong_recipe_stops_before_any_is_applied(base: Path, recipes: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("version: 1\nstages:\n  - method: none-such\n")
    with pytest.raises(ValueError, match="none-such"):
        make_checkpoints(str(base), [*recipes, str(wrong)], tmp_path / "models", silent)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    suite = Suite(summary="", tasks=("fwe",), lengths=(400,), samples=2)
    return {
        "suite": suite,
        "out": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "seed": 1,
        "engine": "transformers",
    }


def test_the_command_compares_and_goes_on(
    base: Path, recipes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    words = ["kvcompress", "eval", "--compare", str(base), *recipes, "--suite", "ruler", "--lengths", "400"]
    words += ["--samples", "1", "--noise-floor", "--resume", "--engine", "transformers", "--out", str(out)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert ended.value.code == 0
        results = json.loads((out / "results.json").read_text())
        schema.Results.model_validate(results)
        assert [model["name"] for model in results["models"]] == ["base", "bits8", "bits2"]
        assert results["noise_floor"]["seeds"] == [42, 43]
    assert {path.name for path in out.iterdir()} == {"models", "results.json", "report.html", "samples", "table.md"}
    assert "bits2" in capsys.readouterr().out
