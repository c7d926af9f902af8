"""Run what is missing of every model: the tasks on one engine and the text on another, or all on one.

One model is in memory at a time, and an engine is started for a model once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcompress_eval.engines import Engine, open_engine
from kvcompress_eval.engines.choosing import Engines, first_line
from kvcompress_eval.models import Model
from kvcompress_eval.records import Records
from kvcompress_eval.tasks.agreement import Reference
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Progress
from kvcompress_eval.work import Work

WHOLE = "evaluation"
"""Name of the step that all others are part of."""


class EngineStartError(ValueError):
    """An engine did not start."""


@dataclass(frozen=True)
class Run:
    """An evaluation that is spelled out.

    Args:
        again: the tasks of another seed, which the first model runs as well.
        how: what rows depend on besides the engines.
        ends: tokens at which each model stops.
    """

    models: Sequence[Model]
    work: Work
    again: Work | None
    tokenizer: TextTokenizer
    out: Path
    how: Mapping[str, Any]
    ends: Mapping[str, frozenset[int]]
    resume: bool
    tell: Progress

    def everything(self, engines: Engines, say: Callable[[str], None]) -> tuple[list[Records], Records | None, Engines]:
        """Every model's records, those of the noise floor, and the engines that made them.

        Raises:
            EngineStartError: an engine that the user named does not start.
        """
        say(engines.sentence)
        try:
            records, repeated = self._with(engines)
        except EngineStartError as error:
            if not engines.chosen:
                raise
            engines = engines.without_vllm(str(error))
            say(f"warning: {engines.sentence}; name --engine vllm to see it fail in full")
            records, repeated = self._with(engines)
        return records, repeated, engines

    def _with(self, engines: Engines) -> tuple[list[Records], Records | None]:
        base = self.models[0] if self.models[0].role == "baseline" else None

        def kept(model: Model, work: Work, folder: Path, seed: int) -> Records:
            how = {**self.how, "engine": engines.tasks, "seed": seed}
            reference = None if model is base else base
            ends = self.ends[model.name]
            label = model.name if work is self.work else f"{model.name}, other prompts"
            options: dict[str, Any] = {"resume": self.resume, "text_engine": engines.text, "ends": ends}
            return Records(model, reference, work, folder, how, label=label, **options)

        seed = self.how["seed"]
        records = [kept(model, self.work, self.out / "samples", seed) for model in self.models]
        repeated = None
        if self.again is not None:
            repeated = kept(self.models[0], self.again, self.out / "samples" / "noise-floor", seed + 1)
        parts = [*records, *([repeated] if repeated is not None else [])]
        tell = part_of_the_whole(self.tell, [costs for part in parts for costs in part.costs().items()])
        if engines.tasks == engines.text:
            self._stage(engines.text, records, repeated, base, tell, tasks=True, text=True)
        else:
            # Tasks first: that an engine does not start should show before anything else has taken time.
            self._stage(engines.tasks, records, repeated, base, tell, tasks=True, text=False)
            self._stage(engines.text, records, None, base, tell, tasks=False, text=True)
        return records, repeated

    def _stage(
        self,
        kind: str,
        records: Sequence[Records],
        repeated: Records | None,
        base: Model | None,
        tell: Progress,
        *,
        tasks: bool,
        text: bool,
    ) -> None:
        reference = Reference()
        others = [record for record in records if record.model is not base] if base is not None else []
        for record in records:
            is_base = record.model is base
            repeats = repeated if record is records[0] and repeated is not None and repeated.tasks_pending else None
            has_tasks = tasks and (record.tasks_pending or repeats is not None)
            # The base's scores are not on disk: they are made again for candidates that lack theirs.
            compared = max((other.missing_windows for other in others), key=len, default=range(0))
            answers = any(other.needs_agreement for other in others) if is_base else record.needs_agreement
            has_text = text and bool(record.missing_windows or answers or (is_base and compared))
            if not (has_tasks or has_text):
                continue
            engine = self._open(kind, record.model, tell)
            try:
                for part in (record, repeats) if has_tasks else ():
                    if part is not None:
                        part.run_tasks(engine, full_generations=self.how["full_generations"], tell=tell)
                if has_text and is_base:
                    kept = record.run_text(engine, tell=tell, again=compared)
                    reference = Reference(texts=kept)
                    if answers:
                        reference = replace(record.collect_reference(engine, tell=tell), texts=kept)
                elif has_text:
                    record.run_text(engine, tell=tell, reference=reference if base is not None else None)
                    if answers:
                        record.measure_agreement(engine, reference, seed=self.how["seed"], tell=tell)
            finally:
                engine.close()

    def _open(self, kind: str, model: Model, tell: Progress) -> Engine:
        what = f"starting {kind}: {model.name}"
        tell(what, 0, 1)
        needs = [item.max_context for item in (self.work, self.again) if item is not None]
        options = {"dtype": self.how["dtype"], **self.how["engine_options"]}
        try:
            engine = open_engine(kind, model.folder, self.tokenizer, max_context=max(needs), **options)
        except (ImportError, ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise EngineStartError(f"{kind} cannot run {model.path}: {first_line(error)}") from error
        tell(what, 1, 1)
        return engine


def part_of_the_whole(tell: Progress, costs: Sequence[tuple[str, float]]) -> Progress:
    """`tell`, which is also told how much of everything is done, in steps' costs."""
    cost = dict(costs)
    shares: dict[str, float] = {}

    def told(what: str, done: int, total: int) -> None:
        tell(what, done, total)
        if what in cost and total:
            shares[what] = done / total
            reached = sum(cost[step] * share for step, share in shares.items())
            tell(WHOLE, int(reached), int(sum(cost.values())))

    return told
