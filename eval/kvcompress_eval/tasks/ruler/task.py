"""What every RULER task says of itself, and how it is asked for samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from kvcompress_eval.tasks.ruler.sample import Request, Sample
from kvcompress_eval.tasks.ruler.scoring import Metric
from kvcompress_eval.tasks.ruler.strings import strings


class Task(ABC):
    """Base of the families; their fields are the benchmark's parameters."""

    family: ClassVar[str]
    metric: ClassVar[Metric] = "all"

    @property
    def tokens_to_generate(self) -> int:
        """Tokens left for the answer, part of every sample's length."""
        return strings(self.family).tokens_to_generate

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the files (see sources.py) without which there is no such task."""
        return ()

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the files that its samples depend on, where given."""
        return self.needs

    @abstractmethod
    def generate(self, request: Request) -> Iterator[Sample]:
        """Samples in order; each depends on all before it.

        Raises:
            NotApplicableError: impossible at this length with this tokenizer.
            ValueError: a file is missing, or is not what it should be.
        """
