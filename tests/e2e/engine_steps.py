"""What an engine scheduled in each of its steps: the evidence that a prompt was cut, or that a batch was mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = tuple[str, int, int, int]
"""A request, its tokens computed before a step, its tokens in the step, and its prompt's length."""


@dataclass
class Steps:
    """One list per engine step, and each request's prompt."""

    rows: list[list[Row]] = field(default_factory=list)
    prompts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, llm: Any) -> Steps:
        """Record from now on. The engine's scheduler must run in this process."""
        steps, scheduler = cls(), llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def recorded(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            steps._note(output)
            return output

        scheduler.schedule = recorded
        return steps

    def _note(self, output: Any) -> None:
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        self.prompts |= {new.req_id: list(new.prompt_token_ids) for new in output.scheduled_new_reqs}
        known = output.scheduled_cached_reqs
        computed |= dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        scheduled = output.num_scheduled_tokens
        self.rows.append([(name, computed[name], count, len(self.prompts[name])) for name, count in scheduled.items()])

    @property
    def chunks(self) -> int:
        """How often a step ended inside a request's prompt."""
        return sum(before + count < prompt for row in self.rows for _, before, count, prompt in row)

    @property
    def mixed(self) -> int:
        """Steps in which some requests were fed their prompt and others decoded."""
        kinds = [{before < prompt for _, before, _, prompt in row} for row in self.rows]
        return sum(len(found) == 2 for found in kinds)
