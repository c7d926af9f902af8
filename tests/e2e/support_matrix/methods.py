"""The matrix's columns: a recipe per method, and what it must refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from tests import tiny

TRAINING = "steps: 4, batch: 2, samples: 8, length: 64"
FACTORED = "{method: fwsvd, removed: 0.2, ranks: error}"
PCA = "{method: pca, rank: {k: 1.0, v: 0.75}}"
GEAR = "{method: gear, bits: 4, block: 32, group: 32}"

WINDOW = {"sliding_window": 40, "layer_types": ["full_attention"] * (tiny.NUM_LAYERS - 1) + ["sliding_attention"]}
"""Settings of a model one of whose layers attends a window only."""

WHOLE = {"elastic_rank": "which cannot be served at KV rank", "elastic_bits": "which cannot be served at KV bits"}
NO_CODEC = dict.fromkeys(WHOLE, "no layer of the checkpoint has a codec")


@dataclass(frozen=True)
class Method:
    """Its recipe, and by feature words of the reason that must be given for not serving it."""

    stages: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    pool: int = 16
    """Blocks that make the pressed engine preempt."""

    def compress(self, base: Path, out: Path) -> Path:
        made = recipes.parse(f"version: 1\nstages: [{', '.join(self.stages)}]\n", registry.schemas())
        compressing.compress(str(base), made, out, compressing.Options(samples=8, length=96), lambda *_: None)
        return out


def _gear(*stages: str) -> Method:
    # Its rings take blocks of the same pool.
    return Method(stages, {"sliding_window": "vLLM's CPU backend cannot hold such caches", **WHOLE}, pool=34)


def _shared(*stages: str) -> Method:
    return Method(stages, {"tensor_parallel": "not divided over ranks", **WHOLE})


METHODS = {
    "pca+scalar": Method((PCA, "{method: scalar, target_bits_per_channel: {k: 4.5, v: 3.5}}")),
    "matryoshka+scalar": Method((f"{{method: matryoshka, rank: 0.75, {TRAINING}}}", "{method: scalar, bits: 8}")),
    # Sixteen bits at full rank: with fewer, answers depend on how a prompt is cut (see the notes).
    "xkv+scalar": _shared("{method: xkv, group: 2, rank: 1.0, metric: none}", "{method: scalar, bits: 16}"),
    "gear": _gear(GEAR),
    "matryoshka+gear": _gear(f"{{method: matryoshka, rank: 0.5, {TRAINING}}}", GEAR),
    "transmla": Method(
        ("{method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}",),
        {"sliding_window": "attend a sliding window", **NO_CODEC},
    ),
    "fwsvd": Method((FACTORED,), NO_CODEC),
    "fwsvd+pca+scalar": Method((FACTORED, PCA, "{method: scalar, bits: {k: 8, v: 8}}")),
}
