"""A checkpoint's config.json as transformers reads it, and the model it describes, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.families import family_of
from kvcompress.model_config import unknown


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


def check_model(checkpoint: Checkpoint) -> None:
    """Make the model that config.json describes, without memory for its weights.

    Raises:
        ValueError: transformers cannot, or it is of a family that we do not know and not an ordinary decoder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint.path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model class does with values that it does not expect
        raise _refusal(checkpoint.path, error) from error
    family = family_of(checkpoint.config)
    if family.tried:
        names, layers = family.names, f"{family.names.layers}."
        rotary = any(name == names.rotary for name, _ in model.named_modules())
        missing = [] if rotary else [names.rotary]
        missing += [name for name in model.state_dict() if name.startswith(layers) and name not in checkpoint.tensors]
        if missing:
            model_type = checkpoint.config["model_type"]
            raise unknown(
                family.architecture, model_type, f"; it is not ordinary: {missing[0]} is not where it usually is"
            )


def _refusal(directory: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or "no reason given"
    return ValueError(
        f"{directory / 'config.json'} is not accepted by transformers: {type(error).__name__}, {reason}; correct it or "
        "download it again"
    )
