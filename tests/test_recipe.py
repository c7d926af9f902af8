from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress import recipe
from kvcompress.methods import registry

GOOD = """\
version: 1
stages:
  - method: pca
    metric: attention
    rank: {k: 0.75, v: 48}
  - method: scalar
    bits: {k: 4, v: 2}
"""


def parse(text: str) -> recipe.Recipe:
    return recipe.parse(text, registry.schemas(), source="r.yaml")


def test_good_recipe() -> None:
    stages = parse(GOOD).stages
    assert [stage.method for stage in stages] == ["pca", "scalar"]
    assert stages[0].model_dump()["rank"] == {"k": 0.75, "v": 48}


def test_json_form_parses_to_the_same_stages() -> None:
    import yaml

    first = parse(GOOD)
    assert parse(yaml.safe_dump(first.to_json())).stages == first.stages


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank:", "rnak:", "r.yaml line 5: unknown key 'rnak' in pca; did you mean 'rank'?"),
        ("0.75", "1.5", "r.yaml line 5: pca.rank.k: found 1.5; expected a share"),
        ("v: 48", "v: 0", "r.yaml line 5: pca.rank.v: found 0; expected at least one channel"),
        ("attention", "entropy", "r.yaml line 4: pca.metric: found 'entropy'"),
        ("method: pca", "method: pcaa", "r.yaml line 3: unknown method 'pcaa'; did you mean 'pca'?"),
        ("k: 4", "k: 3", "r.yaml line 7: scalar.bits.k: found 3"),
        ("bits: {k: 4, v: 2}", "bits: {k: 4}", "r.yaml line 7: scalar.bits.v: field required"),
        ("version: 1", "version: 7", "r.yaml line 1: found version 7, expected 1"),
        ("version: 1", "version: 1\n5: x", "r.yaml line 2: unknown key 5"),
        ("stages:", "stages: " + "[" * 3000, "r.yaml: YAML nested too deeply"),
        ("version: 1", "versoin: 1", "r.yaml line 1: unknown key 'versoin'; did you mean 'version'?"),
        ("    bits: {k: 4, v: 2}", "    target_bits_per_channel: 9", "r.yaml line 7: scalar.target_bits_per_channel"),
        ("    bits: {k: 4, v: 2}", "    bands: {k: [[2, 8], [4, 8]], v: [[4, 8]]}", "most to fewest"),
    ],
)
def test_mistakes_name_the_line_and_the_fix(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError) as error:
        parse(GOOD.replace(old, new, 1))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("  - method: pca\n  - method: pca\n", "line 4: pca is a second basis after pca"),
        (
            "  - method: scalar\n    bits: 4\n  - method: pca\n",
            "line 5: pca (basis) must come before scalar (encoding)",
        ),
        ("  - 3\n", "line 3: a stage needs a 'method'"),
        ("  []\n", "expected a list of stages"),
        ("  - method: scalar\n    bits: 4\n    target_bits_per_channel: 2\n", "found bits and target_bits_per_channel"),
    ],
)
def test_impossible_compositions(stages: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(f"version: 1\nstages:\n{stages}")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [\n", "version: 1\nstages: {}\n", "!!python/object:os.system {}\n"])
def test_not_a_recipe(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe file"):
        recipe.load(tmp_path / "none.yaml", registry.schemas())
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        recipe.load(tmp_path / "binary.yaml", registry.schemas())


@pytest.mark.parametrize("path", sorted(Path("examples/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_example_recipes_parse(path: Path) -> None:
    assert recipe.load(path, registry.schemas()).stages


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("version: 1\nversion: 1\nstages: []\n", 2),
        ("version: 1\nstages:\n  - {method: pca}\nstages:\n  - {method: scalar, bits: 4}\n", 4),
        ("version: 1\nstages:\n  - method: scalar\n    bits: 8\n    bits: 4\n", 5),
    ],
)
def test_a_key_given_twice(text: str, line: int) -> None:
    with pytest.raises(ValueError, match=f"recipe line {line}: the key .* is given twice"):
        recipe.parse(text, {})
