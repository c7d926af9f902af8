"""A checkpoint's config.json as transformers reads it, and the model it describes, without weights."""

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
        raise _refusal(directory, error) from error


def check_model(directory: Path) -> None:
    """Make the model that config.json describes, without memory for its weights.

    Raises:
        ValueError: transformers cannot.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(directory)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model class does with values that it does not expect
        raise _refusal(directory, error) from error


def _refusal(directory: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or "no reason given"
    return ValueError(
        f"{directory / 'config.json'} is not accepted by transformers: {type(error).__name__}, {reason}; correct it or "
        "download it again"
    )
