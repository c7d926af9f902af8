"""Quality at equal bytes beside what others do: our recipes and simulated peers on the same windows of held-out text.

    python benchmarks/peers.py MODEL --work build/peers --machine epyc-2core [--resume]
    python benchmarks/peers.py MODEL --text my-texts/ --windows 2048:4 --recipes half my-4x --peers int4-hadamard

Per row: bytes of cache per token with everything that is stored; and against the model with its ordinary cache the KL
divergence (mean, 99 % and 99.9 % quantile, mean of each quarter of the window), the share of equal most probable
tokens, and perplexity. All in float32; every token, its own step's included, is attended in its stored form, except in
a method's exact window. What a peer's simulation leaves out is said in `quality/roster.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from kvcompress_eval.environment import environment
from kvcompress_eval.models import fingerprint, is_compressed, read_config
from kvcompress_eval.tokenizer import TextTokenizer
from quality import table
from quality.calibration import calibration_windows
from quality.checkpoints import compressed, our_row
from quality.comparison import Found, measure
from quality.kept import Kept
from quality.results import result_row
from quality.roster import PEERS
from quality.rows import ELEMENT_BYTES, Row, peer_row
from quality.windows import Plan, Window, text_files
from transformers.utils import logging

from kvcompress.geometry import ModelGeometry

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"
RECIPES = ("half", "balanced", "aggressive", "xkv", "xkv-values", "gear")
"""Of the examples those that change the cache alone and need no training."""


def main() -> None:
    with refusals_in_one_line():
        run(arguments())


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Bad input ends the process as it ends kvcompress's own commands."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, help="an uncompressed checkpoint")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="folder for checkpoints and scores")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="text files or folders; default: the package's held-out text"
    )
    parser.add_argument(
        "--windows",
        nargs="+",
        default=["1024:1", "4096:1"],
        metavar="TOKENS:COUNT[:KIND,KIND]",
        help="of each kind of text",
    )
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="examples, .yaml files, compressed checkpoints")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--machine", default="cpu", help="short name of the machine for the file's name")
    parser.add_argument("--note", default="", help="what else a reader must know of this run")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-MACHINE-peers.json")
    parser.add_argument("--resume", action="store_true", help="keep the scores that --work has already")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Check everything that was asked for, then make checkpoints, then measure."""
    if is_compressed(args.model):
        raise ValueError(f"{args.model} is compressed; expected the uncompressed model that every row is compared with")
    if unknown := set(args.peers) - set(PEERS):
        raise ValueError(f"no peer {', '.join(sorted(unknown))}; expected some of {', '.join(PEERS)}")
    logging.set_verbosity_error()  # texts are longer than a model's context, and are cut
    logging.disable_progress_bar()
    config, tokenizer = read_config(args.model), TextTokenizer(args.model)
    files = text_files(args.text or [heldout()])
    windows = [window for words in args.windows for window in Plan.parse(words).windows(files, tokenizer)]
    folders = {Path(recipe).stem: checkpoint(args.model, recipe, args.work) for recipe in args.recipes}
    model = load(args.model)
    rows = [our_row(name, folder, model) for name, folder in folders.items()]
    rows += [peer_row(name, model, config, lambda: calibration_windows(args.model)) for name in args.peers]
    kept = Kept(args.work / "scores", fingerprint(args.model))
    out = args.out or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{args.machine}-peers.json"
    write = partial(write_results, out, args.model, args.note, rows, windows)
    table.show(write(measure(model, rows, windows, kept, args.resume, write)))
    print(out)


def heldout() -> Path:
    """The folder of texts that come with the evaluation, one file per kind."""
    return Path(str(resources.files("kvcompress_eval"))) / "heldout"


def checkpoint(base: Path, recipe: str, work: Path) -> Path:
    """A compressed checkpoint as given, or one of the recipe."""
    return Path(recipe) if Path(recipe).is_dir() else compressed(base, recipe, work)


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_results(
    out: Path, model: Path, note: str, rows: list[Row], windows: list[Window], found: Found
) -> dict[str, Any]:
    """What is found so far, as a file and as what the file holds."""
    full_bytes = ModelGeometry.from_config(read_config(model)).kv_bytes_per_token(ELEMENT_BYTES)
    results = {
        "model": model.resolve().name,
        "bytes_per_token": full_bytes,
        "windows": [{"kind": window.kind, "tokens": len(window.tokens)} for window in windows],
        "environment": environment(),
        "note": note,
        "rows": [result_row(row, full_bytes, found[row.name]) for row in rows if found[row.name]],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
