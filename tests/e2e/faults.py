"""Ways in which a server could answer wrongly, each planted where it would happen: files, tensors, engine, memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcompress.checkpoint.digests import tensor_key
from kvcompress.checkpoint.manifest import MANIFEST_FILE, Manifest
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.checkpoint.verify import CODEC_FILE, verify

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and what the refusal must say.

    `files` damages a copy of the checkpoint; `tensors` changes the tensors of one of its files and makes all hashes
    again, so that nothing but the server's behaviour can show it; `engine` is asked of vLLM; `running` names one of
    `RUNNING`, done in the engine's process.
    """

    message: str
    files: Callable[[Path], None] | None = None
    tensors: tuple[str, Callable[[Tensors], None]] | None = None
    engine: dict[str, Any] | None = None
    running: str = ""

    def plant(self, model: Path, folder: Path) -> dict[str, Any]:
        """The engine's arguments."""
        if self.files is None and self.tensors is None:
            return {"model": str(model), **(self.engine or {})}
        shutil.copytree(model, folder)
        if self.files is not None:
            self.files(folder)
        if self.tensors is not None:
            rewrite(folder, *self.tensors)
        return {"model": str(folder)}


def rewrite(folder: Path, file: str, change: Callable[[Tensors], None]) -> None:
    """Change tensors of one file and make its hashes again: nothing that `verify` could notice."""
    tensors = load_tensors(folder / file)
    change(tensors)
    saved = save_tensors(folder / file, tensors)
    manifest = Manifest.load(folder)
    manifest.tensors |= {tensor_key(file, name): sha256 for name, sha256 in saved.tensors.items()}
    manifest.headers[file] = saved.header_sha256
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    assert verify(folder).ok


# Files.


def truncated_codec(folder: Path) -> None:
    data = (folder / CODEC_FILE).read_bytes()
    (folder / CODEC_FILE).write_bytes(data[: len(data) // 2])


def flipped_bit(file: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-1001] ^= 4
        (folder / file).write_bytes(data)

    return flip


def stale_manifest(folder: Path) -> None:
    """The codec of a later run under the manifest of an earlier one."""
    tensors = load_tensors(folder / CODEC_FILE)
    save_tensors(folder / CODEC_FILE, {name: x * 1.001 for name, x in tensors.items()})


def edited_bands(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codec"]["layers"][2]["k"]["bands"] = [[8, 32]]
    (folder / "config.json").write_text(json.dumps(config))


def missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def unlisted_weights(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model-extra.safetensors")


# Tensors.


def scales_reversed(tensors: Tensors) -> None:
    tensors["layers.4.v.scale"] = tensors["layers.4.v.scale"].flip(-1).contiguous()


def gain_overflow(tensors: Tensors) -> None:
    tensors["layers.2.k.scale"] *= 1e-7


def sign_flipped(tensors: Tensors) -> None:
    tensors["layers.5.k.basis"][1, :, 3] *= -1


def inverse_scaled(tensors: Tensors) -> None:
    tensors["layers.1.v.inverse"] *= 1.5


def mean_of_nothing(tensors: Tensors) -> None:
    tensors["layers.3.v.mean"] -= 3 * tensors["layers.3.v.scale"].amax()


def layers_swapped(tensors: Tensors) -> None:
    """The first two layers whose tensors have the same shapes."""
    names = [f"{side}.{part}" for side in "kv" for part in ("mean", "basis", "inverse", "scale")]
    shapes: dict[Any, int] = {}
    for index in range(8):
        shape = tuple(tensors[f"layers.{index}.{name}"].shape for name in names)
        if shape in shapes:
            for name in names:
                _swap(tensors, f"layers.{shapes[shape]}.{name}", f"layers.{index}.{name}")
            return
        shapes[shape] = index
    raise AssertionError("no two layers are alike")


def heads_swapped(tensors: Tensors) -> None:
    for part in ("mean", "basis", "inverse", "scale"):
        tensors[f"layers.6.k.{part}"] = tensors[f"layers.6.k.{part}"].flip(0).contiguous()


def _swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def other_keys(tensors: Tensors) -> None:
    """As a finetuned model's weights under the codec of its base."""
    tensors["model.layers.3.self_attn.k_proj.weight"] *= 1.6


def not_finite(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.v_proj.weight"][5, 7] = float("nan")


# While the engine runs: what a step is told, or what the kernels hold, is not so.


def begins_at(batch: Any) -> int:
    return int(batch.seq_lens[0]) - int(batch.num_actual_tokens)


def lost_prefix(batch: Any) -> Any:
    """A step that follows cached blocks finds another request's first block in their place."""
    if begins_at(batch) == 0:
        return batch
    table = batch.block_table.clone()
    table[:, 0] = 0
    return replace(batch, block_table=table)


def wrong_table(batch: Any) -> Any:
    if int(batch.num_actual_tokens) != 1:
        return batch
    return replace(batch, block_table=batch.block_table.roll(1, 1))


def wrong_slots(batch: Any) -> Any:
    """Tokens are written one slot further than they are read."""
    return replace(batch, slot_mapping=batch.slot_mapping.roll(1))


STEPS: dict[str, Callable[[Any], Any]] = {
    "lost prefix": lost_prefix,
    "wrong table": wrong_table,
    "wrong slots": wrong_slots,
}


@contextmanager
def running(name: str) -> Iterator[None]:
    """In the engine's process: every step of every layer meets a fault."""
    from kvcompress.serving.vllm.heads import HeadsImpl

    stock = HeadsImpl.run, HeadsImpl.use_codec

    def run(self: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, step: Any, output: Tensor) -> None:
        stock[0](self, query, key, value, cache, STEPS[name](step), output)

    def use_codec(self: Any, codec: Any, device: Any, longest: int) -> None:
        """The kernels are given half the values' size."""
        spoiled = replace(codec.v, inverse_HRD=codec.v.inverse_HRD / 2)
        stock[1](self, type(codec)(codec.k, spoiled), device, longest)

    if name in STEPS:
        HeadsImpl.run = run  # type: ignore[method-assign]
    elif name == "other codec":
        HeadsImpl.use_codec = use_codec  # type: ignore[method-assign]
    try:
        yield
    finally:
        HeadsImpl.run, HeadsImpl.use_codec = stock  # type: ignore[method-assign]


def attempts(engines: list[dict[str, Any]], faults: list[str]) -> dict[str, Any]:
    """The message with which each engine refuses to start while its fault happens."""
    from tests.e2e.vllm_engine import attempts as plain

    found = []
    for engine, name in zip(engines, faults, strict=True):
        with running(name):
            found += plain([engine])["errors"]
    return {"errors": found}


_DAMAGED = "is damaged: "
_LOSES = r"canary stops the server: layer {} \(model.layers.{}.self_attn.attn\) loses .* of its {} in KV head {}"
_OTHER = r"canary stops the server: layer {} .* computes other keys than its codec was made for"
_PATH = r"canary stops the server: layer \d .*, {}: attention from compressed pages differs by"

FAULTS = {
    "codec file cut short": Fault(_DAMAGED + ".*codec.safetensors", files=truncated_codec),
    "bit of the codec flipped": Fault(_DAMAGED + ".*codec.safetensors::layers", files=flipped_bit(CODEC_FILE)),
    "bit of the weights flipped": Fault(_DAMAGED + ".*model.safetensors::", files=flipped_bit(WEIGHTS)),
    "manifest of another run": Fault(_DAMAGED + ".*codec.safetensors::layers", files=stale_manifest),
    "bands edited in config.json": Fault(_DAMAGED + "config.json: expected", files=edited_bands),
    "weights missing": Fault(_DAMAGED + "model.safetensors.*missing", files=missing_weights),
    "weights that nobody listed": Fault(_DAMAGED + "model-extra.safetensors", files=unlisted_weights),
    "scales in the wrong order": Fault(_LOSES.format(4, 4, "values", 0), tensors=(CODEC_FILE, scales_reversed)),
    "gain beyond sixteen bits": Fault(_LOSES.format(2, 2, "keys", 0), tensors=(CODEC_FILE, gain_overflow)),
    "sign of a basis vector": Fault(_LOSES.format(5, 5, "keys", 1), tensors=(CODEC_FILE, sign_flipped)),
    "wrong scale of the inverse": Fault(_LOSES.format(1, 1, "values", 0), tensors=(CODEC_FILE, inverse_scaled)),
    "wrong mean": Fault(_LOSES.format(3, 3, "values", 0), tensors=(CODEC_FILE, mean_of_nothing)),
    "layers swapped": Fault(_LOSES.format(r"\d", r"\d", r"\w+", r"\d"), tensors=(CODEC_FILE, layers_swapped)),
    "heads swapped": Fault(_LOSES.format(6, 6, "keys", 0), tensors=(CODEC_FILE, heads_swapped)),
    "weights of another model": Fault(_OTHER.format(3), tensors=(WEIGHTS, other_keys)),
    "weights that are not numbers": Fault(
        "layer 2 .* computes values that are not finite", tensors=(WEIGHTS, not_finite)
    ),
    "another rotary base": Fault(
        _OTHER.format(0), engine={"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}}
    ),
    "positions scaled": Fault(
        _OTHER.format(0),
        engine={
            "hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "max_model_len": 320,
        },
    ),
    "prefix lost": Fault(_PATH.format("(decode|prefix hit|chunked prefill)"), running="lost prefix"),
    "block table mixed up": Fault(_PATH.format("decode"), running="wrong table"),
    "tokens in the wrong slots": Fault(_PATH.format("prefill"), running="wrong slots"),
    "kernels with another codec": Fault(_PATH.format("prefill"), running="other codec"),
}
"""By name. `test_faults.py` has one more: pages overwritten while the server runs."""
