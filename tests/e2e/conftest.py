"""Fixtures that several end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model by the example recipe of that name, from little calibration text."""
    out = tmp_path_factory.mktemp("balanced") / "balanced"
    recipe = recipes.load(ROOT / "examples" / "recipes" / "balanced.yaml", registry.schemas())
    options = compressing.Options(samples=8, length=256)
    compressing.compress(str(ROOT / "assets" / "reference-model"), recipe, out, options, lambda *_: None)
    return out
