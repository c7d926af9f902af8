"""The range of vLLM releases that kvcompress is tested with. Imports no more of vLLM than its number."""

from __future__ import annotations

import re

from vllm.version import __version__

SUPPORTED_VLLM = ((0, 31), (0, 33))
"""First supported and first unsupported (major, minor)."""


def check_version(found: str) -> None:
    """Refuse a vLLM we have not been tested with, before its changed interfaces fail in stranger ways.

    Raises:
        RuntimeError: outside `SUPPORTED_VLLM`.
    """
    first, stop = SUPPORTED_VLLM
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or not first <= (int(match[1]), int(match[2])) < stop:
        supported = f">= {first[0]}.{first[1]}, < {stop[0]}.{stop[1]}"
        raise RuntimeError(
            f"found vLLM {found}; kvcompress serves through vLLM {supported}; install such a vLLM or another kvcompress"
        )


vllm_version: str = __version__
check_version(vllm_version)
