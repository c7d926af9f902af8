"""Which engine runs what, where the user names none: vLLM for tasks if it can serve every model, transformers for text.

Text is read for whole distributions of the next token, which the KL divergence needs and only transformers gives.
Decided from config.json and vLLM's list of architectures, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from kvcompress.families import LATENT_ARCHITECTURE
from kvcompress_eval.engines.names import AUTO, TRANSFORMERS, VLLM

NOT_IN_VLLM = ("float64",)


@dataclass(frozen=True)
class Engines:
    """The engines of an evaluation, and why these."""

    tasks: str
    text: str
    reason: str
    chosen: bool = False
    """Whether we chose, and may choose again where vLLM does not start."""

    @property
    def sentence(self) -> str:
        which = self.tasks if self.tasks == self.text else f"{self.tasks} for tasks, {self.text} for text"
        return f"engine {which}: {self.reason}"

    def without_vllm(self, why: str) -> Engines:
        """What is left where vLLM failed to start."""
        return replace(self, tasks=TRANSFORMERS, reason=f"vLLM did not start ({why})", chosen=False)


def choose_engines(
    named: str, configs: Mapping[str, Mapping[str, Any]], *, tasks: Sequence[str], dtype: str
) -> Engines:
    """The engines for these models.

    Args:
        named: what the user said; an engine that was named runs everything.
        configs: config.json of each model, by its name.
        tasks: the suite's.
    """
    if named != AUTO:
        return Engines(named, named, "named by the user")
    if not tasks:
        return Engines(TRANSFORMERS, TRANSFORMERS, "the suite has no tasks, and text needs whole distributions")
    refusal = _why_not_vllm(configs, dtype)
    if refusal is not None:
        return Engines(TRANSFORMERS, TRANSFORMERS, refusal)
    reason = "vLLM has the architecture of every model; the KL divergence needs whole distributions"
    return Engines(VLLM, TRANSFORMERS, reason, chosen=True)


def _why_not_vllm(configs: Mapping[str, Mapping[str, Any]], dtype: str) -> str | None:
    """Why vLLM cannot run all of the models, in a few words; None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if dtype in NOT_IN_VLLM:
        return f"vLLM does not compute in {dtype}"
    try:
        from kvcompress.serving.vllm.compat import offline

        known = {*offline.architectures(), LATENT_ARCHITECTURE}
    except Exception as error:  # a broken installation raises whatever its parts do
        return f"vLLM cannot be imported ({first_line(error)})"
    for name, config in configs.items():
        named = config.get("architectures")
        found = [item for item in named if isinstance(item, str)] if isinstance(named, list) else []
        if known.isdisjoint(found):
            return f"vLLM does not have {name}'s architecture ({', '.join(found) or 'config.json names none'})"
    return None


def first_line(error: BaseException) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
