"""The forms that a layer's cache can take, and where each has its rooms: the one place that lists them.

A form is a folder or a file of the same name on every floor, found by its name:

    codec/<form>/spec.py            <Form>Spec: plain data, no torch
    codec/<form>/codec.py           <Form>Codec: what becomes of keys and values
    ops/<form>/attention.py         `bind(codec, device)`: the kernels, or the torch code that specifies them
    serving/vllm/<form>.py          the engine's side
    serving/transformers/<form>.py  <Form>Layer: the cache layer of `generate`

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Form:
    """One form; `package` is what its floors are in."""

    name: str
    package: str = "kvcompress"

    @property
    def spec(self) -> Any:
        """The class of `codec.spec.CacheSpec`."""
        return getattr(importlib.import_module(f"{self.package}.codec.{self.name}.spec"), f"{self.name.title()}Spec")

    @property
    def codec(self) -> Any:
        """The class of `codec.contract.CacheCodec`."""
        return getattr(importlib.import_module(f"{self.package}.codec.{self.name}.codec"), f"{self.name.title()}Codec")

    @property
    def cache_layer(self) -> Any:
        """The class of `serving.transformers.layer.CompressedLayer`."""
        return getattr(self.serving("transformers"), f"{self.name.title()}Layer")

    def serving(self, engine: str) -> ModuleType:
        """The room of an engine, "vllm" or "transformers"."""
        return importlib.import_module(f"{self.package}.serving.{engine}.{self.name}")


FORMS = {name: Form(name) for name in ("heads", "shared", "blocks", "latent", "prompt")}
"""By name, which is also what config.json says."""
