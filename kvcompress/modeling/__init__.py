"""Modules and model classes a compressed checkpoint needs beyond those of stock transformers. They know no method and
no engine.

`register` makes transformers' auto classes know them; importing this package imports neither torch nor transformers.
"""

from __future__ import annotations


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` read our checkpoints. May be called any number of times."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvcompress.modeling.mla import KVCompressMLAConfig, KVCompressMLAForCausalLM

    AutoConfig.register(KVCompressMLAConfig.model_type, KVCompressMLAConfig, exist_ok=True)
    AutoModelForCausalLM.register(KVCompressMLAConfig, KVCompressMLAForCausalLM, exist_ok=True)
