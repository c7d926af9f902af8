"""Text for peers that are calibrated: the calibration text that ships with the package, never a test's."""

from __future__ import annotations

from pathlib import Path

from kvcompress_eval.models import read_config

from kvcompress.calibration import tokenizer
from kvcompress.calibration.corpus import BUILTIN, Corpus

from .windows import Window

SAMPLES, TOKENS = 8, 1024


def calibration_windows(model: Path) -> list[Window]:
    """Samples of the built-in calibration text in a model's tokens."""
    vocabulary = int(read_config(model)["vocab_size"])
    corpus = Corpus(BUILTIN, tokenizer.load(model), vocabulary, lambda *_: None)
    made = corpus.sample(SAMPLES, TOKENS, context=TOKENS, seed=0)
    return [Window("calibration", tuple(tokens)) for tokens in made.tokens_NT.tolist()]
