"""`python -m kvcompress_cli` is `kvcompress`."""

from kvcompress_cli.main import run

run()
