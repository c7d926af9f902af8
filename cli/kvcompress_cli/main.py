"""The Typer application and what every command shares: one-line errors, exit codes, `--debug`."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, NoReturn

import typer

from kvcompress_cli import compress, decompress, evaluate, inspect, methods, plan, serve, verify

app = typer.Typer(
    name="kvcompress",
    help="Compress the KV cache of language models after training, serve it through vLLM, measure what was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from kvcompress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["KVCOMPRESS_DEBUG"] = "1"


for _module in (plan, compress, verify, inspect, evaluate, serve, decompress, methods):
    _module.register(app)


def run() -> None:
    """Entry point. Exit codes: 0 done; 1 a check failed; 2 bad input; 130 interrupted."""
    try:
        result = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was finished is kept, go on with --resume", 130)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # a usage error: typer brings its own click, so no class to name
        if usage is not None:
            _fail(" ".join(usage().split()), 2)
        if os.environ.get("KVCOMPRESS_DEBUG"):
            raise
        _fail(_sentence(error), 2)
    sys.exit(result if isinstance(result, int) else 0)


def _sentence(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk ({error.filename or 'output folder'})"
    if isinstance(error, ValueError | OSError | ImportError):
        return message or type(error).__name__
    # Nobody has said at the place what is wrong: a fault of ours, and still no wall of text.
    return f"unexpected {type(error).__name__}: {message or 'no message'}; please report it with what --debug shows"


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
