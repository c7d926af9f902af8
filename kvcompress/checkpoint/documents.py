"""Which files of a checkpoint's folder are the model, which are about it, and which an operator may edit."""

from __future__ import annotations

from kvcompress.checkpoint.reader import ADAPTER_FILE, CONFIG_FILE, INDEX_FILE, PICKLE_SUFFIXES

_ABOUT = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_ABOUT_NAMES = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "CITATION", "CHANGELOG")
_WEIGHTS_AND_CODE = (".safetensors", ".safetensors.index.json", ".gguf", ".py", *PICKLE_SUFFIXES)
_LOADED_NAMES = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "params.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

LOADED_FOLDERS = ("", "kvcompress", "additional_chat_templates")
"""Where loaders look, relative to the checkpoint."""


def is_document(name: str) -> bool:
    """Whether a file is about the model and no part of it: the card, a licence, images. No loader reads it.

    Args:
        name: relative to the checkpoint's folder.
    """
    if name.startswith("kvcompress/"):
        return False
    own = name.rpartition("/")[2]
    return own.lower().endswith(_ABOUT) or own.partition(".")[0].upper() in _ABOUT_NAMES or own == ".gitattributes"


def is_loaded(name: str) -> bool:
    """Whether a loader of models, tokenizers or chat templates reads a file of this name without being told to."""
    own = name.rpartition("/")[2]
    return own.endswith((*_WEIGHTS_AND_CODE, ".jinja")) or own in _LOADED_NAMES


def check_acceptable(name: str) -> None:
    """Refuse files whose change makes another model: weights, codec, config.json, code, and our own records.

    Raises:
        ValueError: naming the file.
    """
    if (
        name.startswith("kvcompress/")
        or name in (CONFIG_FILE, INDEX_FILE, ADAPTER_FILE)
        or name.endswith(_WEIGHTS_AND_CODE)
    ):
        raise ValueError(
            f"{name} is part of the compressed model, and a change of it cannot be accepted, as one of chat template, "
            "tokenizer or generation settings can; get a new copy of it, or compress the model again"
        )
