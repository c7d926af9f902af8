"""Checkpoint in, compressed checkpoint out: capture -> fit -> write, layer by layer, journalled and resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.calibration import corpus
from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.manifest import (
    MANIFEST_FILE,
    BytesPerToken,
    Calibration,
    Manifest,
    Parent,
    Sizes,
    fingerprint,
    is_published,
    package_versions,
)
from kvcompress.checkpoint.reader import CONFIG_FILE, CONFIG_VERSION, QUANT_METHOD, Checkpoint
from kvcompress.checkpoint.verify import CODEC_FILE
from kvcompress.checkpoint.workdir import WorkDir, check_output, remove_published_leftover
from kvcompress.codec.spec import CodecSpec
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.card import model_card
from kvcompress.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.pipeline.plan import Plan

RECIPE_FILE = "kvcompress/recipe.yaml"
DTYPES = ("float32", "bfloat16", "float16")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Options:
    """How to calibrate. `length` is capped by the model's context."""

    calibration: str = corpus.BUILTIN
    samples: int = 32
    length: int = 512
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ValueError(f"found {self.samples} samples of {self.length} tokens; expected at least 1 of 2")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")


def compress(model: str, recipe: Recipe, out: str | Path, options: Options, progress: Progress) -> Plan:
    """Write a compressed checkpoint to `out`.

    The same inputs give the same bytes, however often the run was killed and resumed on the way.

    Args:
        model: folder or hub id of an uncompressed checkpoint.
        out: folder to make; appears complete, by one rename.

    Raises:
        ValueError: bad input (nothing is left behind), a full disk, or an unfinished run without `resume`.
    """
    remove_published_leftover(out)
    checkpoint = Checkpoint.open(model)
    length = min(options.length, int(checkpoint.config.get("max_position_embeddings") or options.length))
    plan = planning.make(checkpoint, recipe, model, calibration_tokens=options.samples * length)
    calibration = _calibration(checkpoint, plan, options, length)
    progress("hashing the base model", 0, 1)
    parent = Parent.of(checkpoint, model)
    record = Calibration(
        name=calibration.name,
        sha256=calibration.sha256,
        samples=options.samples,
        tokens=int(calibration.tokens_NT.size),
        device=options.device,
        dtype=options.dtype,
    )
    versions = package_versions()
    inputs = fingerprint(recipe.to_json(), options.seed, record, parent, versions)
    if options.resume and is_published(out, inputs):
        return plan
    target = check_output(out, resume=options.resume)
    check_free_space(target, _bytes_to_write(checkpoint, plan, options.samples * length))
    with WorkDir.open(target, inputs, resume=options.resume) as work:
        layers, tensors = _fit_layers(checkpoint, plan, calibration, options, work, progress)
        spec = CodecSpec.from_json({"layers": [layer["codec"] for layer in layers]})
        digests = writer.copy_shards(checkpoint, work, progress=bytes_progress(progress, plan.weights_bytes))
        digests |= writer.copy_side_files(checkpoint, work)
        digests |= writer.write_tensors(work, CODEC_FILE, tensors)
        config = {**checkpoint.config, "quantization_config": _config_section(spec)}
        digests |= writer.write_file(work, CONFIG_FILE, json_file.pretty(config))
        digests |= writer.write_file(work, RECIPE_FILE, recipe.text.encode())
        manifest = Manifest(
            parent=parent,
            recipe=recipe.to_json(),
            seed=options.seed,
            calibration=record,
            versions=versions,
            bytes_per_token=BytesPerToken(
                base=plan.base_bytes_per_token, compressed=plan.bytes_per_token, ratio=round(plan.ratio, 4)
            ),
            weights_bytes=Sizes(base=plan.weights_bytes, compressed=plan.weights_bytes),
            stages=[{"kind": stage.kind, **stage.model_dump(mode="json")} for stage in recipe.stages],
            layers=[layer["summary"] for layer in layers],
        )
        digests |= writer.write_file(work, writer.CARD_FILE, model_card(manifest, recipe).encode())
        manifest.files, manifest.headers, manifest.tensors = digests.files, digests.headers, digests.tensors
        writer.write_file(work, MANIFEST_FILE, manifest.to_bytes())
        work.publish()
    return plan


def _config_section(spec: CodecSpec) -> dict[str, Any]:
    return {"quant_method": QUANT_METHOD, "version": CONFIG_VERSION, "codec": spec.to_json()}


def _calibration(checkpoint: Checkpoint, plan: Plan, options: Options, length: int) -> corpus.Calibration:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{checkpoint.path} has no tokenizer that transformers can read ({reason})") from None
    return corpus.build(
        options.calibration,
        tokenizer,
        options.samples,
        length,
        plan.geometry.max_position_embeddings,
        options.seed,
        int(checkpoint.config["vocab_size"]),
    )


def _fit_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: corpus.Calibration,
    options: Options,
    work: WorkDir,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Fit every layer that is not in the journal yet. Returns each layer's record, and all codec tensors."""
    import torch

    from kvcompress.calibration.capture import LayerRunner
    from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
    from kvcompress.codec.layer import to_tensors
    from kvcompress.pipeline.fit import fit_layer

    total = plan.geometry.num_layers
    first = next((index for index in range(total) if not _layer_done(work, index)), total)
    # The hidden states of a layer are kept only until the next layer is done, so go back to where they still are.
    while first and first < total and not _scratch_intact(work, first - 1, "hidden"):
        first -= 1
    if first < total:
        runner = LayerRunner(checkpoint, options.device, getattr(torch, options.dtype))
        if first:
            hidden = load_tensors(work.scratch(_scratch_name(first - 1, "hidden")))["hidden"].to(options.device)
        else:
            hidden = runner.embed(calibration)
        for index in range(first, total):
            progress("fitting layers", index, total)
            fitted = fit_layer(runner, plan, index, hidden, calibration.offsets_N)
            codec = fitted.codec
            files = {"codec": {} if codec is None else to_tensors(index, codec), "hidden": {"hidden": hidden}}
            if index == total - 1:
                del files["hidden"]
            saved = {
                kind: save_tensors(work.scratch(_scratch_name(index, kind)), content).sha256
                for kind, content in files.items()
            }
            spec = CodecSpec((None if codec is None else codec.spec,))
            record = {
                "codec": spec.to_json()["layers"][0],
                "summary": _summary(plan, index, spec, fitted.errors),
                "scratch": saved,
            }
            work.commit(f"layer:{index}", {}, record)
            if index:
                work.scratch(_scratch_name(index - 1, "hidden")).unlink(missing_ok=True)
    progress("fitting layers", total, total)
    tensors: dict[str, Tensor] = {}
    for index in range(total):
        tensors |= load_tensors(work.scratch(_scratch_name(index, "codec")))
    return [work.data(f"layer:{index}") for index in range(total)], tensors


def _summary(plan: Plan, index: int, spec: CodecSpec, errors: dict[str, float]) -> dict[str, Any]:
    layers = (None,) * index + spec.layers + (None,) * (plan.geometry.num_layers - index - 1)
    summary = planning.layer_summary(index, CodecSpec(layers), plan.geometry)
    if errors:
        summary["relative_error"] = round(errors["both"], 6)
        summary["k"]["relative_error"] = round(errors["k"], 6)
        summary["v"]["relative_error"] = round(errors["v"], 6)
    return summary


def _scratch_name(index: int, kind: str) -> str:
    return f"layer-{index:04d}-{kind}.safetensors"


def _scratch_intact(work: WorkDir, index: int, kind: str) -> bool:
    path = work.scratch(_scratch_name(index, kind))
    recorded = work.data(f"layer:{index}")["scratch"]
    return kind in recorded and path.is_file() and sha256_file(path) == recorded[kind]


def _layer_done(work: WorkDir, index: int) -> bool:
    return work.done(f"layer:{index}") and _scratch_intact(work, index, "codec")


def _bytes_to_write(checkpoint: Checkpoint, plan: Plan, tokens: int) -> int:
    """Shards, the codec twice (scratch and final), and the hidden states of two layers."""
    geometry = plan.geometry
    codec = 2 * geometry.num_layers * geometry.num_kv_heads * (2 * geometry.head_dim**2 + 2 * geometry.head_dim) * 4
    return plan.weights_bytes + 2 * codec + 2 * tokens * geometry.hidden_size * 4 + (1 << 20)


def bytes_progress(progress: Progress, total: int) -> Callable[[int], None]:
    """Adds up the counts that the writer reports, for a progress that wants how much is done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("writing weights", min(done, total), total)

    return advance
