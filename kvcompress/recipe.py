"""Recipes: YAML to checked stages. A method's pydantic config is the schema of its stage; this module knows no method.

    version: 1
    stages:
      - method: pca
        rank: {k: 0.75, v: 0.75}
      - method: scalar
        bits: {k: 4, v: 2}

Every mistake is one sentence that names the line, what was found, what was expected and the nearest right word.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Kind = Literal["weights", "attention", "heal", "basis", "encoding"]
KINDS: tuple[Kind, ...] = ("weights", "attention", "heal", "basis", "encoding")
"""Also the order in which stages run; only `weights` may appear more than once."""

RECIPE_VERSION = 1


class StageConfig(BaseModel):
    """One stage of a recipe. Subclasses add a method's parameters as fields and set `kind`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[Kind]
    method: str


class Pair(BaseModel):
    """A parameter that keys and values have apart. Subclasses add the fields `k` and `v`; one value stands for both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        return value if isinstance(value, (dict, cls)) else {"k": value, "v": value}


class Lines:
    """Turns a path inside the document into `source line N`, using the deepest part of the path that exists."""

    def __init__(self, source: str, root: yaml.Node | None) -> None:
        self.source, self.root = source, root

    def __call__(self, path: Iterable[str | int]) -> str:
        node, line = self.root, 0
        for part in path:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        return f"{self.source} line {line + 1}"


@dataclass(frozen=True)
class Recipe:
    """Stages in running order, with the text they were read from."""

    stages: tuple[StageConfig, ...]
    text: str
    name: str
    where: Lines

    def stage(self, kind: Kind) -> StageConfig | None:
        """The only stage of a kind that allows one, if there is one."""
        assert kind != "weights"
        return next((stage for stage in self.stages if stage.kind == kind), None)

    def locate(self, stage: StageConfig, error: ValueError) -> ValueError:
        """An error found later, against a model, with the line of the stage it is about."""
        if stage not in self.stages:
            return error
        return ValueError(f"{self.where(('stages', self.stages.index(stage), 'method'))}: {error}")

    def to_json(self) -> dict[str, Any]:
        return {"version": RECIPE_VERSION, "stages": [stage.model_dump(mode="json") for stage in self.stages]}


def load(path: Path, schemas: Mapping[str, type[StageConfig]]) -> Recipe:
    """Read and check a recipe file.

    Args:
        schemas: config class per method name.

    Raises:
        ValueError: the file is missing, is not YAML, or is not a recipe.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"no recipe file at {path}; see examples/recipes for ready ones") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; expected a YAML recipe") from None
    return parse(text, schemas, source=str(path), name=path.stem)


def parse(text: str, schemas: Mapping[str, type[StageConfig]], source: str = "recipe", name: str = "recipe") -> Recipe:
    """Check recipe text; `source` is how errors name it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise ValueError(f"{source}: YAML nested too deeply; expected a mapping with 'version' and 'stages'") from None
    _check_once(root, source)
    where = Lines(source, root)
    if not isinstance(data, dict):
        raise ValueError(f"{source}: found {type(data).__name__}, expected a mapping with 'version' and 'stages'")
    for key in data:
        if key not in ("version", "stages"):
            raise ValueError(f"{where((key,))}: unknown key {key!r}{_did_you_mean(str(key), ('version', 'stages'))}")
    if data.get("version") != RECIPE_VERSION:
        raise ValueError(f"{where(('version',))}: found version {data.get('version')!r}, expected {RECIPE_VERSION}")
    stages = data.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{where(('stages',))}: expected a list of stages, each with a 'method'")
    checked = tuple(_stage(index, stage, schemas, where) for index, stage in enumerate(stages))
    _check_composition(checked, where)
    return Recipe(checked, text, name, where)


def _check_once(root: yaml.Node | None, source: str) -> None:
    """Refuse a key that is given twice in one mapping, of which YAML's reader would take the last."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias may contain itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if str(key.value) in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{source} line {line}: the key {key.value!r} is given twice; keep one of them")
                keys.add(str(key.value))
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _stage(index: int, stage: Any, schemas: Mapping[str, type[StageConfig]], where: Lines) -> StageConfig:
    at: tuple[str | int, ...] = ("stages", index)
    if not isinstance(stage, dict) or not isinstance(stage.get("method"), str):
        raise ValueError(f"{where(at)}: a stage needs a 'method'; known methods: {', '.join(sorted(schemas))}")
    method = stage["method"]
    if method not in schemas:
        hint = _did_you_mean(method, schemas)
        known = ", ".join(sorted(schemas))
        raise ValueError(f"{where((*at, 'method'))}: unknown method {method!r}{hint}; known methods: {known}")
    schema = schemas[method]
    for key in stage:
        if key not in schema.model_fields:
            fields = [field for field in schema.model_fields if field != "method"]
            hint = _did_you_mean(str(key), fields)
            listed = ", ".join(fields)
            raise ValueError(f"{where((*at, key))}: unknown key {key!r} in {method}{hint}; known keys: {listed}")
    try:
        return schema.model_validate(stage)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        name = ".".join([method, *(str(part) for part in first["loc"])])
        found = "" if isinstance(first["input"], dict) else f"found {first['input']!r}; "
        raise ValueError(f"{where(at + first['loc'])}: {name}: {found}{message}") from None


def _check_composition(stages: Sequence[StageConfig], where: Lines) -> None:
    seen: dict[Kind, int] = {}
    for index, stage in enumerate(stages):
        line = where(("stages", index, "method"))
        if stage.kind != "weights" and stage.kind in seen:
            first = stages[seen[stage.kind]].method
            raise ValueError(f"{line}: {stage.method} is a second {stage.kind} after {first}; keep one of them")
        later = [other for other in KINDS[KINDS.index(stage.kind) + 1 :] if other in seen]
        if later:
            other = stages[seen[later[0]]].method
            raise ValueError(f"{line}: {stage.method} ({stage.kind}) must come before {other} ({later[0]}); swap them")
        if stage.kind == "heal" and not seen:
            raise ValueError(f"{line}: {stage.method} repairs what weights and attention stages change; add one before")
        seen[stage.kind] = index


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
