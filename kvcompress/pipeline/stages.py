"""Stages that change the checkpoint itself: each reads the one before it and writes a whole new one into scratch.

So every stage, and the cache codec after them, sees an ordinary checkpoint; what it costs is disk space for one copy
of the weights per stage until the run is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import Method, Outline, TrainedConfig, TransformMethod
from kvcompress.methods.registry import METHODS

if TYPE_CHECKING:
    from kvcompress.methods.context import Context, Progress
    from kvcompress.recipe import Recipe, StageConfig


def transforms(recipe: Recipe) -> Iterator[tuple[int, TransformMethod[StageConfig], StageConfig]]:
    """Position, method and config of each stage that changes the checkpoint, in running order."""
    for position, stage in enumerate(recipe.stages):
        method = METHODS[stage.method]
        if isinstance(method, TransformMethod):
            yield position, method, stage


def refuse_quantized(recipe: Recipe) -> None:
    """For a base model whose weights are quantized: only what leaves them alone can work on it.

    Raises:
        ValueError: a stage that changes weights or trains, with its line in the recipe.
    """
    fit = [name for name, method in METHODS.items() if not _needs_weights(method)]
    for stage in recipe.stages:
        method = METHODS[stage.method]
        if _needs_weights(method):
            does = "changes the weights" if isinstance(method, TransformMethod) else "trains on the whole model"
            raise recipe.locate(
                stage,
                ValueError(
                    f"{stage.method} {does}, and the weights of the base model are quantized; compress the unquantized "
                    f"model, or use methods of the cache alone: {', '.join(fit)}"
                ),
            )


def _needs_weights(method: Method[Any]) -> bool:
    return isinstance(method, TransformMethod) or issubclass(method.config, TrainedConfig)


def outlines(recipe: Recipe, before: Outline) -> Outline:
    """The checkpoint's outline after all stages that change it.

    Raises:
        ValueError: a stage does not fit the model, with its line in the recipe.
    """
    for _, method, stage in transforms(recipe):
        try:
            before = method.outline(stage, before)
        except ValueError as error:
            raise recipe.locate(stage, error) from None
    return before


def outline_of(checkpoint: Checkpoint) -> Outline:
    return Outline(
        dict(checkpoint.config), {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    )


def run(
    recipe: Recipe, checkpoint: Checkpoint, context_of: Callable[[Checkpoint, ModelGeometry, str], Context]
) -> Checkpoint:
    """Run the stages that change the checkpoint; the last one's result, or `checkpoint` itself where there are none.

    Args:
        context_of: makes the context of a stage, from the checkpoint before it, its sizes and the stage's name.
    """
    for position, method, stage in transforms(recipe):
        before = outline_of(checkpoint)
        context = context_of(checkpoint, before.geometry, f"stage-{position}")
        out = context.scratch("checkpoint")
        if not context.work.done(context.unit):
            transform, final = method.transform(stage, before, context)
            with WorkDir.open(out, {"stage": context.unit}, resume=True) as work:
                total = sum(info.nbytes for info in checkpoint.tensors.values())
                writer.copy_shards(
                    checkpoint, work, transform, bytes_progress(context.progress, "writing weights", total)
                )
                writer.copy_side_files(checkpoint, work)
                writer.write_file(work, CONFIG_FILE, json_file.pretty(final.config))
                work.publish()
            written = Checkpoint.open(out).weights_bytes
            assert written == final.weights_bytes, f"{stage.method} wrote {written} bytes"
            context.work.commit(context.unit, {})
        planned = method.outline(stage, before).weights_bytes
        checkpoint = Checkpoint.open(out)
        assert checkpoint.weights_bytes <= planned, f"{stage.method} wrote more than planned"
    return checkpoint


def bytes_progress(progress: Progress, step: str, total: int) -> Callable[[int], None]:
    """Adds up the counts that readers or writers report, from any thread, for a progress that wants what is done."""
    done, one_at_a_time = 0, Lock()

    def advance(count: int) -> None:
        nonlocal done
        with one_at_a_time:
            done += count
            progress(step, min(done, total), total)

    return advance
