"""Every method by name. Adding a method is one file, one import and one entry here; CLI, docs and plan follow."""

from __future__ import annotations

from typing import Any

from kvcompress.methods.base import EncodingMethod, Method, ModelBasis
from kvcompress.methods.fwsvd import Fwsvd
from kvcompress.methods.heal import Heal
from kvcompress.methods.matryoshka import Matryoshka
from kvcompress.methods.pca import Pca
from kvcompress.methods.scalar import Scalar
from kvcompress.methods.xkv import Xkv
from kvcompress.recipe import Recipe, StageConfig

METHODS: dict[str, Method[Any]] = {
    method.name: method for method in (Fwsvd(), Heal(), Matryoshka(), Pca(), Xkv(), Scalar())
}


def schemas() -> dict[str, type[StageConfig]]:
    """Stage schema per method name, for `recipe.load`."""
    return {name: method.config for name, method in METHODS.items()}


def describe() -> list[dict[str, Any]]:
    """One entry per method: what `kvcompress methods --json` prints."""
    return [
        {
            "name": method.name,
            "kind": method.kind,
            "summary": method.summary,
            "paper": method.paper,
            "parameters": method.config.model_json_schema(),
        }
        for method in METHODS.values()
    ]


def basis_of(recipe: Recipe) -> tuple[ModelBasis[Any], StageConfig]:
    """The recipe's basis. Without one, every channel is kept on plain principal axes."""
    stage = recipe.stage("basis") or Pca.config(method="pca")
    method = METHODS[stage.method]
    assert isinstance(method, ModelBasis)
    return method, stage


def encoding_of(recipe: Recipe) -> tuple[EncodingMethod[Any], StageConfig]:
    """The recipe's encoding. Without one, latents are stored in 16 bits."""
    stage = recipe.stage("encoding") or Scalar.config.model_validate({"method": "scalar", "bits": 16})
    method = METHODS[stage.method]
    assert isinstance(method, EncodingMethod)
    return method, stage
