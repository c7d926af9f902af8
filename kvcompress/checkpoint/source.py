"""From what the user typed, a local folder or a hub id, to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from kvcompress.checkpoint.atomic import is_disk_full
from kvcompress.checkpoint.paths import quote

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DOWNLOADED = [
    "*.json",
    "*.md",
    "*.safetensors",
    "tokenizer*",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "additional_chat_templates/*",
    "LICENSE*",
    "kvcompress/*",
]
# Other copies of the same weights that some repositories also hold.
NOT_DOWNLOADED = ["original/*", "onnx/*", "consolidated*"]


def resolve(model: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, or the hub's files for that id, downloaded or from the cache.

    `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and the hub's other settings apply.

    Raises:
        ValueError: neither a folder here nor a model that can be had from the hub.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no folder {quote(str(model))}: {error}; give the whole path") from error
    named = str(model) != ""  # Path("") would be the current folder
    try:
        path.exists()
    except OSError as error:  # a name too long, a part that may not be read
        raise ValueError(f"no folder {quote(str(model))}: {(error.strerror or '').lower()}; check the path") from error
    if named and path.is_dir():
        return path
    if named and path.exists():
        raise ValueError(f"{path} is a file; expected the folder of a Hugging Face checkpoint, or a hub id")
    if not HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"no folder {quote(str(model))}; expected the folder of a Hugging Face checkpoint, or a hub id"
        )
    return _from_hub(str(model))


def _from_hub(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED))
    except errors.GatedRepoError as error:
        why, fix = "the hub asks for its terms to be accepted", f"accept them at https://huggingface.co/{model}"
        cause: Exception = error
    except errors.RepositoryNotFoundError as error:
        why, fix = "the hub has no such model, or it is private", "check the name, or log in with `hf auth login`"
        cause = error
    except errors.LocalEntryNotFoundError as error:
        why, fix = "it is not in the local cache and the hub cannot be reached", "download it first, or go online"
        cause = error
    except Exception as error:  # the hub client lets errors of several network libraries through
        if is_disk_full(error):
            raise
        first_line = (str(error).strip() or error.__class__.__name__).splitlines()[0]
        why, fix = f"the hub client says {quote(first_line)}", "check the name and the network"
        cause = error
    raise ValueError(f"no folder {quote(model)} here, and as a hub id: {why}; {fix}") from cause
