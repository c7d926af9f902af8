"""What `kvcompress eval --compare A B C` compares: checkpoints and recipes, and the base they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcompress_eval.models import MANIFEST
from kvcompress_eval.units import Progress

RECIPE_SUFFIXES = (".yaml", ".yml")


def is_recipe(given: str) -> bool:
    return given.endswith(RECIPE_SUFFIXES)


def split_base(given: Sequence[str], baseline: str | None) -> tuple[str, list[str]]:
    """The base, and what is compared with it: `baseline` if given, else the first one if it is a model that was not
    compressed, else the model that all compressed ones were made from.

    Raises:
        ValueError: no base can be told, or nothing is left to compare.
    """
    if baseline is None and not is_recipe(given[0]) and not _manifest(given[0]).is_file():
        baseline, given = given[0], given[1:]
    if not given:
        raise ValueError("nothing to compare: give the base first, then recipes or compressed checkpoints")
    return baseline if baseline is not None else _parent(given), list(given)


def make_checkpoints(base: str, given: Sequence[str], folder: Path, progress: Progress) -> list[str]:
    """The candidates as checkpoints: each recipe is applied to the base, with the settings `compress` has by default.

    A checkpoint that is in `folder` already and has the same inputs is kept, an interrupted one is gone on with.

    Raises:
        ValueError: a recipe is wrong, two have the same name, or `folder` holds a checkpoint made from other inputs.
    """
    from kvcompress import recipe as recipes
    from kvcompress.methods.registry import schemas
    from kvcompress.pipeline.compress import Options, compress

    # Every recipe is read before the first one is applied: a mistake in the last should cost no time.
    checked = {item: recipes.load(Path(item), schemas()) for item in given if is_recipe(item)}
    targets = {item: folder / Path(item).stem for item in checked}
    if len(set(targets.values())) < len(targets):
        raise ValueError(f"two recipes have the same file name: {', '.join(targets)}; rename one")
    for item, recipe in checked.items():
        compress(base, recipe, targets[item], Options(resume=True), progress)
    return [str(targets.get(item, item)) for item in given]


def _parent(given: Sequence[str]) -> str:
    from kvcompress.checkpoint.manifest import Manifest

    found = {item: Manifest.load(item).parent.source for item in given if _manifest(item).is_file()}
    sources = set(found.values())
    if len(sources) != 1:
        named = "; ".join(f"{item}: {source}" for item, source in found.items()) or "none of them is a checkpoint"
        raise ValueError(f"found no base that all share ({named}); name it with --baseline")
    return sources.pop()


def _manifest(given: str) -> Path:
    return Path(given) / MANIFEST
