"""RULER: the tasks that need no download, byte for byte, with their metric."""

from kvcompress_eval.tasks.ruler.generation import generate
from kvcompress_eval.tasks.ruler.registry import OFFICIAL, TASKS, ruler_task
from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample
from kvcompress_eval.tasks.ruler.scoring import score, task_score

__all__ = [
    "OFFICIAL",
    "TASKS",
    "NotApplicableError",
    "Request",
    "Sample",
    "generate",
    "ruler_task",
    "score",
    "task_score",
]
