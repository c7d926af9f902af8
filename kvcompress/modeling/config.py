"""A checkpoint's config.json as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_config(directory: Path) -> Any:
    """The configuration object of transformers, our own classes known, no code of the checkpoint run.

    Raises:
        ValueError: transformers does not accept it; its classes check the types of all their fields.
    """
    from transformers import AutoConfig

    from kvcompress import modeling

    modeling.register()
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of many kinds: the hub client's, KeyError, AttributeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{directory / 'config.json'} is not accepted by transformers: {reason}") from error
