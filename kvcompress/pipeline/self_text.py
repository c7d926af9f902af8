"""`--calibration self`: samples that the model writes itself, batch by batch, kept in the working folder."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcompress.calibration import corpus
from kvcompress.checkpoint.atomic import atomic_write
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.quantized import scales_of
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.workdir import WorkDir

if TYPE_CHECKING:
    from kvcompress.calibration.generate import Openings
    from kvcompress.methods.context import Progress

SELF = "self"
BATCH = 32
"""Sequences sampled at once, and lost at most when a run is killed."""
STEP = "sampling calibration text"


class SelfText:
    """Samples of a model's own text; the same inputs give the same ones, also after a kill.

    Args:
        checkpoint: an unquantized model.
        text_tokenizer: a transformers tokenizer.
        longest: tokens of the model's context.

    Raises:
        ValueError: weights are quantized, or the tokenizer does not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text_tokenizer: Any,
        vocab_size: int,
        longest: int,
        seed: int,
        device: str,
        dtype: str,
        progress: Progress,
    ) -> None:
        from kvcompress.calibration import generate

        if scales_of(checkpoint.tensors):
            raise ValueError(
                f"{checkpoint.path} has quantized weights, which are dequantized layer by layer only; sample text from "
                "the unquantized model, or give --calibration builtin or a file"
            )
        self._checkpoint, self._longest, self._seed = checkpoint, longest, seed
        self._device, self._dtype, self._progress = device, dtype, progress
        self._openings: Openings = generate.openings(text_tokenizer, _stops(checkpoint, text_tokenizer), seed)
        forced = [*self._openings.begin, *self._openings.before, *self._openings.middle, *self._openings.after]
        highest = max([*forced, *(token for ids in self._openings.seeds for token in ids)], default=0)
        if highest >= vocab_size:
            raise ValueError(
                f"the tokenizer of {checkpoint.path} does not fit the model: it gives id {highest}, outside the "
                f"model's vocabulary of {vocab_size}; get both from one place"
            )
        self._work: WorkDir | None = None

    @staticmethod
    def settings() -> dict[str, Any]:
        """How tokens are drawn, for the manifest."""
        from kvcompress.calibration import generate

        return {"temperature": generate.TEMPERATURE, "top_p": generate.TOP_P, "top_k": generate.TOP_K}

    def keep_in(self, work: WorkDir) -> None:
        """Where finished batches go; to be called before the first sample."""
        self._work = work

    def sample(self, samples: int, length: int) -> corpus.Calibration:
        """So many samples of so many tokens, the latter capped by the model's context."""
        length = min(length, self._longest)
        tokens_NT = np.concatenate(self._batches(samples, length))
        return corpus.place(SELF, tokens_NT, self._longest, np.random.Generator(np.random.PCG64(self._seed)))

    def _batches(self, samples: int, length: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        import torch

        from kvcompress.calibration import generate
        from kvcompress.training.models import load_model

        work = self._work
        assert work is not None
        model: Any = None
        found = []
        for start in range(0, samples, BATCH):
            numbers = range(start, min(samples, start + BATCH))
            unit = f"self-{length}-{numbers.start}-{numbers.stop}"
            path = work.scratch(f"{unit}.tokens")
            if not (work.done(unit) and path.is_file() and sha256_file(path) == work.data(unit)):
                if model is None:
                    model = load_model(self._checkpoint, self._device, getattr(torch, self._dtype))
                state = np.random.SeedSequence([self._seed, length, start]).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(state[0] >> 1))
                report = partial(self._report, start * length, len(numbers), samples * length)
                tokens_NT = generate.generate(model, self._openings, numbers, length, generator, report)
                work.commit(unit, {}, atomic_write(path, tokens_NT.tobytes()))
            found.append(np.frombuffer(path.read_bytes(), np.int64).reshape(len(numbers), length))
        self._progress(STEP, samples * length, samples * length)
        return found

    def _report(self, before: int, batch: int, total: int, step: int) -> None:
        """Tokens of earlier batches, and of this one, each of whose sequences has `step`."""
        self._progress(STEP, before + batch * step, total)


def _stops(checkpoint: Checkpoint, text_tokenizer: Any) -> list[int]:
    """Ids that end a text, from wherever a checkpoint may say so; what is no id is passed over."""
    found: list[Any] = [text_tokenizer.eos_token_id, checkpoint.config.get("eos_token_id")]
    path = checkpoint.file("generation_config.json")
    if path.is_file():
        try:
            settings = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            settings = None
        found.append(settings.get("eos_token_id") if isinstance(settings, dict) else None)
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return [token for token in flat if type(token) is int]
