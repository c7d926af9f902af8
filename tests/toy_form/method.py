"""A method that makes caches of form `halves`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import LayerBases, ModelBasis, Needs, Profile
from kvcompress.methods.context import Context
from kvcompress.recipe import Kind, StageConfig
from tests.toy_form.codec.halves.spec import HalvesSpec

if TYPE_CHECKING:
    from kvcompress.codec.contract import CacheCodec


class HalvesConfig(StageConfig):
    kind: ClassVar[Kind] = "basis"
    method: Literal["halves"] = "halves"
    unit: float = Field(1.0, gt=0, description="what numbers are divided by before they are rounded")


class Halves(ModelBasis[HalvesConfig]):
    name = "halves"
    summary = "Keys and values as IEEE halves"
    paper = "none: a test's toy"
    config = HalvesConfig

    def needs(self, config: HalvesConfig) -> Needs:
        return "nothing"

    def profiles(self, config: HalvesConfig, geometry: ModelGeometry, layers: Sequence[int]) -> Sequence[Profile]:
        return []

    def fit_model(self, config: HalvesConfig, context: Context, profiles: Sequence[Profile]) -> dict[int, LayerBases]:
        return {}

    def own_specs(self, config: HalvesConfig, geometry: ModelGeometry, layers: Sequence[int]) -> Sequence[Any]:
        return [HalvesSpec(geometry.num_kv_heads, geometry.head_dim)] * len(layers)

    def own_codecs(self, config: HalvesConfig, context: Context, specs: Sequence[Any]) -> Sequence[CacheCodec]:
        import torch

        from tests.toy_form.codec.halves.codec import HalvesCodec

        return [HalvesCodec(spec, torch.tensor([config.unit])) for spec in specs]
