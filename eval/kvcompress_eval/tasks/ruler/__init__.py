"""RULER: its thirteen tasks with their metrics, made from a tokenizer, a seed, a length and, for seven, local files."""

from kvcompress_eval.tasks.ruler.generation import generate, provenance, side_by_side
from kvcompress_eval.tasks.ruler.registry import ALL, OFFICIAL, SYNTHETIC, TASKS, check_sources, ruler_task
from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample
from kvcompress_eval.tasks.ruler.scoring import score, task_score
from kvcompress_eval.tasks.ruler.sources import NO_FILES, Sources
from kvcompress_eval.tasks.ruler.templates import BASE, CHAT, ModelTemplate, model_template

__all__ = [
    "ALL",
    "BASE",
    "CHAT",
    "NO_FILES",
    "OFFICIAL",
    "SYNTHETIC",
    "TASKS",
    "ModelTemplate",
    "NotApplicableError",
    "Request",
    "Sample",
    "Sources",
    "check_sources",
    "generate",
    "model_template",
    "provenance",
    "ruler_task",
    "score",
    "side_by_side",
    "task_score",
]
