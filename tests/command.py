"""The command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from kvcompress_cli import main

Run = Callable[..., tuple[int, str, str]]
"""A command line's arguments; gives exit code, standard output and standard error, of native code too."""


def call(*arguments: object) -> int:
    """The exit code of `kvcompress` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kvcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.run()
    return int(stop.value.code or 0)
