"""A recipe's cache stages against a model's sizes, once: what plan, capture, fit and the writing of files go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import EncodingMethod, ModelBasis, Needs, Profile
from kvcompress.methods.registry import basis_of, encoding_of
from kvcompress.recipe import Recipe, StageConfig


@dataclass(frozen=True)
class CacheStages:
    """Basis and encoding, also where the recipe leaves them out, and what they come to before any calibration."""

    recipe: Recipe
    geometry: ModelGeometry
    basis: ModelBasis[Any]
    basis_stage: StageConfig
    encoding: EncodingMethod[Any]
    encoding_stage: StageConfig
    layers: tuple[int, ...]
    """Decoder layers that get a codec."""
    profiles: Sequence[Profile]
    """What the basis leaves to the encoding, by layer; empty where it stores its latents itself."""
    specs: Sequence[CacheSpec]
    """By layer, the bytes exact; bands that depend on data are nominal."""

    @property
    def own(self) -> bool:
        """The basis stores its latents itself."""
        return not self.profiles

    @property
    def needs(self) -> Needs:
        """What the basis is fitted to."""
        return self.basis.needs(self.basis_stage)

    @property
    def spec(self) -> CodecSpec:
        """Of all decoder layers."""
        found = dict(zip(self.layers, self.specs, strict=True))
        return CodecSpec(tuple(found.get(index) for index in range(self.geometry.num_layers)))

    def fit_bytes(self, tokens: int) -> tuple[int, int]:
        """(memory, disk space) that a fit on this many calibration tokens takes at most."""
        return self.basis.fit_bytes(self.basis_stage, self.geometry, tokens)


def resolve(recipe: Recipe, geometry: ModelGeometry) -> CacheStages:
    """Check the cache stages of a recipe against the model as the stages before have left it.

    Raises:
        ValueError: they do not fit, with the line in the recipe.
    """
    basis, basis_stage = basis_of(recipe)
    encoding, encoding_stage = encoding_of(recipe)

    def made(layers: Sequence[int], profiles: Sequence[Profile], specs: Sequence[CacheSpec]) -> CacheStages:
        stages = (basis, basis_stage, encoding, encoding_stage)
        return CacheStages(recipe, geometry, *stages, tuple(layers), profiles, specs)

    stage = recipe.stage("basis") or recipe.stage("encoding")
    if stage is None:
        return made((), (), ())
    if geometry.latent_dims is not None:
        raise recipe.locate(
            stage,
            ValueError(
                f"{stage.method} stores keys and values apart, and in latent attention the value is part of the key: "
                "its cache would grow; use transmla alone"
            ),
        )
    layers = [index for index, window in enumerate(geometry.sliding_window) if not window]
    if not layers:
        raise ValueError(
            "every layer of the model has a sliding window, whose cache is bounded already; nothing to compress"
        )
    try:
        own = basis.own_specs(basis_stage, geometry, layers)
        profiles = basis.profiles(basis_stage, geometry, layers) if own is None else ()
    except ValueError as error:
        raise recipe.locate(basis_stage, error) from None
    if own is not None:
        if (given := recipe.stage("encoding")) is not None:
            raise recipe.locate(
                given, ValueError(f"{basis.name} stores its latents itself in this form; remove {given.method}")
            )
        return made(layers, (), own)
    try:
        return made(layers, profiles, encoding.specs(encoding_stage, geometry, profiles))
    except ValueError as error:
        raise recipe.locate(encoding_stage, error) from None
