from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from kvcompress import recipe as recipes
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorSpec
from kvcompress.checkpoint.verify import verify
from kvcompress.methods import registry
from kvcompress.methods.base import TransformMethod
from kvcompress.pipeline import compress as compressing
from kvcompress.recipe import StageConfig
from tests import compression, tiny
from tests.compression import listed, tree_sha256


class DamageConfig(StageConfig):
    kind: ClassVar[Any] = "weights"
    method: Any = "damage"
    rank: int = 8


class Damage(TransformMethod[DamageConfig]):
    """Cuts the singular values of every down_proj, and leaves shapes as they are."""

    name, summary, paper, config = "damage", "", "", DamageConfig

    def outline(self, config, before):  # type: ignore[no-untyped-def]
        return before

    def transform(self, config, before, context):  # type: ignore[no-untyped-def]
        class Cut:
            def plan(self, info):  # type: ignore[no-untyped-def]
                return [TensorSpec(info.name, info.dtype, info.shape)] if "down_proj" in info.name else None

            def apply(self, name, tensor):  # type: ignore[no-untyped-def]
                u, s, vh = torch.linalg.svd(tensor.float(), full_matrices=False)
                r = config.rank
                yield name, ((u[:, :r] * s[:r]) @ vh[:r]).to(tensor.dtype).contiguous()

        return Cut(), before


@pytest.fixture(autouse=True)
def _with_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "damage", Damage())


def compress(model: Path, out: Path, heal: str | None, progress: Any = lambda *_: None, resume: bool = False) -> Path:
    """With `damage`, healed with these options or not."""
    stages = ["method: damage"]
    if heal is not None:
        stages.append(f"method: heal, batch: 2, samples: 8, length: 48{heal}")
    compression.compress(model, out, listed(*stages), progress, samples=4, length=64, resume=resume)
    return out


def divergence(original: Path, changed: Path) -> float:
    """KL(original || changed) per token, on tokens that training has not seen."""
    tokens = torch.tensor(tiny.prompts([64] * 4, seed=5))
    with torch.no_grad():
        target, found = (tiny.load_model(path)(tokens).logits.log_softmax(-1) for path in (original, changed))
    return float((target.exp() * (target - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def damaged(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.METHODS, "damage", Damage())
        return compress(base_model, tmp_path_factory.mktemp("damaged") / "out", None)


@pytest.mark.parametrize("how", ["", ", lora_rank: 8, learning_rate: 3.0e-2", ", train: all", ", train: [mlp]"])
def test_healing_wins_back_part_of_the_loss(how: str, damaged: Path, base_model: Path, tmp_path: Path) -> None:
    rate = "" if "learning_rate" in how else ", learning_rate: 3.0e-3"
    healed = compress(base_model, tmp_path / "out", f", steps: 30, kl_weight: 1.0{rate}{how}")
    before, after = divergence(base_model, damaged), divergence(base_model, healed)
    assert after < 0.9 * before
    assert verify(healed).ok


def test_only_what_was_damaged_is_trained(damaged: Path, base_model: Path, tmp_path: Path) -> None:
    healed = Checkpoint.open(compress(base_model, tmp_path / "out", ", steps: 2"))
    original, before = Checkpoint.open(base_model), Checkpoint.open(damaged)
    assert {name: (info.dtype, info.shape) for name, info in healed.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in original.tensors.items()
    }
    for name in original.tensors:
        same = torch.equal(healed.read(name), before.read(name))
        assert same == ("down_proj" not in name), name


@pytest.mark.parametrize("lora", ["", ", lora_rank: 4"])
def test_interrupted_and_resumed_healing_gives_the_same_bytes(
    lora: str, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcompress.training.distill.SAVE_EVERY", 2)
    whole = compress(base_model, tmp_path / "whole", f", steps: 5{lora}")
    seen: list[int] = []

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "training":
            seen.append(done)
            if done == 3 and len(seen) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base_model, tmp_path / "out", f", steps: 5{lora}", interrupt, resume=True)
    compress(base_model, tmp_path / "out", f", steps: 5{lora}", interrupt, resume=True)
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    assert tree_sha256(whole) == tree_sha256(tmp_path / "out")


def test_a_damaged_state_is_not_used(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompress.training.distill.SAVE_EVERY", 2)
    seen: list[int] = []

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "training":
            seen.append(done)
            if done == 3 and len(seen) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base_model, tmp_path / "out", ", steps: 4", interrupt)
    [state] = (tmp_path / "out.partial").rglob("*training*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    compress(base_model, tmp_path / "out", ", steps: 4", interrupt, resume=True)
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("heal", "words"),
    [
        (", train: [no_such_name]", "no tensor matches no_such_name"),
        (", train: ['(']", "not a regular expression"),
        (", learning_rate: 0.0", "greater than 0"),
    ],
)
def test_refusals(heal: str, words: str, base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        compress(base_model, tmp_path / "out", heal)
    assert not (tmp_path / "out.partial").exists()


def test_nothing_changed_is_an_error(base_model: Path, tmp_path: Path) -> None:
    made = recipes.parse(
        "version: 1\nstages:\n  - {method: damage, rank: 100000}\n  - method: heal\n", registry.schemas()
    )
    shutil.copytree(base_model, tmp_path / "base")

    class Nothing(Damage):
        def transform(self, config, before, context):  # type: ignore[no-untyped-def]
            transform, after = super().transform(config, before, context)
            transform.plan = lambda info: None
            return transform, after

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.METHODS, "damage", Nothing())
        with pytest.raises(ValueError, match="every tensor is as in the original"):
            compressing.compress(str(base_model), made, tmp_path / "out", compressing.Options(), lambda *_: None)


def test_heal_needs_something_to_repair() -> None:
    with pytest.raises(ValueError, match="line 3: heal repairs what weights and attention stages change"):
        recipes.parse("version: 1\nstages:\n  - method: heal\n", registry.schemas())
    with pytest.raises(ValueError, match=r"heal \(heal\) must come before pca \(basis\)"):
        recipes.parse("version: 1\nstages:\n  - method: pca\n  - method: heal\n", registry.schemas())
