"""Model families, one data file each: a module of this package that has a `FAMILY`. Imports no torch.

What has no file here but follows the usual names is tried all the same (`Family.tried`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from kvcompress.families.family import LINEARS, Experts, Family, Names

__all__ = ["FAMILIES", "LATENT_ARCHITECTURE", "LINEARS", "Experts", "Family", "Names", "family_of", "supported"]

LATENT_ARCHITECTURE = "KVCompressMLAForCausalLM"
"""What `transmla` makes of the others: multi-head latent attention."""


def _found() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    families: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.architecture: family for family in families}


FAMILIES: dict[str, Family] = _found()
"""By the name of the model's class."""


def supported() -> list[str]:
    """Architectures of base models that we know."""
    return [name for name in FAMILIES if name != LATENT_ARCHITECTURE]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; one of the usual names where we know none. `model_config.parse` checks the file."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return FAMILIES.get(name) or Family(name, None, _HARMLESS, _NULLABLE, activation=None, tried=True)


_HARMLESS = {
    "intermediate_size": 1,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
}
"""Keys that nothing here depends on, or that mean one thing everywhere; a family we do not know must say the rest."""
_NULLABLE = frozenset({"num_key_value_heads", "head_dim"})
