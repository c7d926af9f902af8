"""What a recipe keeps of a model by the text it is calibrated on, on windows of held-out text.

    python benchmarks/calibration.py MODEL --machine epyc-2core
    python benchmarks/calibration.py MODEL --sources builtin self mine=notes.jsonl --recipe aggressive --resume

Measured as `benchmarks/peers.py` does: KL divergence against the model with its ordinary cache, in nats.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from kvcompress_eval.environment import environment
from kvcompress_eval.models import fingerprint
from kvcompress_eval.tokenizer import TextTokenizer
from peers import MODEL, ROOT, heldout, load, refusals_in_one_line
from quality.checkpoints import compressed, our_row
from quality.comparison import Found, measure
from quality.kept import Kept
from quality.measure import summary
from quality.windows import Plan, text_files


def main() -> None:
    with refusals_in_one_line():
        run(arguments())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, help="an uncompressed checkpoint")
    parser.add_argument("--sources", nargs="+", default=["builtin", "self"], help="of --calibration, or NAME=SOURCE")
    parser.add_argument("--recipe", default="balanced", help="an example or a .yaml file")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration samples")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--windows", default="1024:3:code,prose,technical", help="TOKENS:COUNT[:KIND,KIND]")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "calibration", help="folder for checkpoints")
    parser.add_argument("--machine", default="cpu", help="short name of the machine for the file's name")
    parser.add_argument("--resume", action="store_true", help="keep the scores that --work has already")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    windows = Plan.parse(args.windows).windows(text_files([heldout()]), TextTokenizer(args.model))
    folders: dict[str, Path] = {}
    for words in args.sources:
        name, _, source = words.rpartition("=")
        options = ["--calibration", source, "--seed", str(args.seed), "--samples", str(args.samples)]
        name = name or source
        folders[name] = compressed(args.model, args.recipe, args.work / f"{name}-{args.seed}-{args.samples}", options)
    model = load(args.model)
    rows = [our_row(name, folder, model) for name, folder in folders.items()]
    out = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{args.machine}-calibration.json"
    kept = Kept(args.work / "scores", fingerprint(args.model))
    found = measure(model, rows, windows, kept, args.resume, lambda found: None)
    results = {
        "model": args.model.resolve().name,
        "recipe": Path(args.recipe).stem,
        "windows": args.windows,
        "seed": args.seed,
        "samples": args.samples,
        "environment": environment(),
        "sources": {name: by_kind(found, name) for name in folders},
    }
    out.write_text(json.dumps(results, indent=1) + "\n")
    for name, kinds in results["sources"].items():
        print(f"{name:>10}: " + ", ".join(f"{kind} {values['kl']:.4f}" for kind, values in kinds.items()))
    print(out)


def by_kind(found: Found, name: str) -> dict[str, dict[str, Any]]:
    """Figures of each kind of text, and of all windows together."""
    kinds = sorted({window.kind for window, _ in found[name]})
    groups = {kind: [scores for window, scores in found[name] if window.kind == kind] for kind in kinds}
    return {kind: summary(scores) for kind, scores in {**groups, "all": [s for _, s in found[name]]}.items()}


if __name__ == "__main__":
    main()
