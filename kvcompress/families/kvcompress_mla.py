"""Made by `transmla`, which writes every key that matters; from models without a window."""

from __future__ import annotations

from kvcompress.families.family import Family
from kvcompress.families.llama import DEFAULTS

FAMILY = Family("KVCompressMLAForCausalLM", "kvcompress_mla", DEFAULTS, windows="dropped")
