"""Checkpoint in, compressed checkpoint out: capture -> fit -> write, layer by layer, journalled and resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.calibration import corpus, tokenizer
from kvcompress.calibration.device import check_device
from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.finite import check_finite
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
from kvcompress.checkpoint.quantized import BASE, base_section
from kvcompress.checkpoint.reader import CONFIG_FILE, CONFIG_VERSION, QUANT_METHOD, Checkpoint, is_compressed
from kvcompress.checkpoint.verify import CODEC_FILE, STATEMENT_FILE
from kvcompress.checkpoint.workdir import WorkDir, check_output, remove_published_leftover
from kvcompress.codec.spec import CodecSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.context import Context, Progress
from kvcompress.modeling.config import check_model
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline import stages
from kvcompress.pipeline.card import model_card
from kvcompress.pipeline.self_text import SELF, SelfText
from kvcompress.recipe import Recipe
from kvcompress.training import distributed

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.pipeline.plan import Plan

RECIPE_FILE = "kvcompress/recipe.yaml"
Sampler = Callable[[int, int], corpus.Calibration]
"""So many samples of so many tokens of the calibration text."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """How to calibrate. `length` is capped by the model's context; `strict` refuses model families we do not know."""

    calibration: str = corpus.BUILTIN
    samples: int = 32
    length: int = 512
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    resume: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ValueError(f"found {self.samples} samples of {self.length} tokens; expected at least 1 of 2")
        if self.seed < 0:
            raise ValueError(f"found the seed {self.seed}; expected 0 or more")
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
    check_device(options.device)
    target = check_output(out, resume=options.resume, finished=options.resume)
    checkpoint = Checkpoint.open(model)
    tokens = options.samples * options.length
    plan = planning.make(checkpoint, recipe, model, calibration_tokens=tokens, strict=options.strict)
    length = min(options.length, plan.geometry.context)
    check_model(checkpoint)
    writer.check_side_files(checkpoint)
    text = _Text(checkpoint, plan, options, progress)
    # Text of files is read, checked and cut before any work; what the model has to write itself comes after.
    cut = None if text.own else text.sample(options.samples, length)
    prompt = partial(_prompt, text, plan.geometry.vocab_size)
    if not (options.resume and target.is_dir()):  # which may be finished, and takes no more
        check_free_space(target, _bytes_to_write(checkpoint, plan, options.samples * length))
    check_finite(checkpoint, stages.bytes_progress(progress, "checking the base model", checkpoint.weights_bytes))
    parent = Parent.of(
        checkpoint, model, stages.bytes_progress(progress, "hashing the base model", checkpoint.weights_bytes)
    )
    record = Calibration(
        name=SELF if cut is None else cut.name,
        sha256="" if cut is None else cut.sha256,
        samples=options.samples,
        tokens=options.samples * length,
        device=options.device,
        dtype=options.dtype,
        sampling=SelfText.settings() if cut is None else None,
    )
    versions = package_versions()
    inputs = fingerprint(recipe.to_json(), options.seed, record, parent, versions)
    if options.resume and is_published(out, inputs):
        return plan
    check_output(out, resume=options.resume)
    with distributed.leading(), WorkDir.open(target, inputs, resume=options.resume) as work:
        if text.own:
            text.own.keep_in(work)
        calibration = cut or text.sample(options.samples, length)
        record = record.model_copy(update={"sha256": calibration.sha256})
        context = _context(plan, checkpoint, text.sample, calibration, options, work, progress)
        final = stages.run(recipe, checkpoint, context)
        spec, tensors, layers, statement = _cache_codec(plan, context(final, plan.geometry, "codec"), prompt)
        digests = writer.copy_shards(
            final, work, progress=stages.bytes_progress(progress, "writing weights", final.weights_bytes)
        )
        digests |= writer.copy_side_files(final, work)
        digests |= writer.write_tensors(work, CODEC_FILE, tensors)
        if statement is not None:
            digests |= writer.write_file(work, STATEMENT_FILE, json_file.canonical(statement))
        config = {**final.config, "quantization_config": _config_section(final, spec)}
        digests |= writer.write_file(work, CONFIG_FILE, json_file.pretty(config))
        digests |= writer.write_file(work, RECIPE_FILE, recipe.text.encode())
        manifest = Manifest(
            parent=parent,
            recipe=recipe.to_json(),
            seed=options.seed,
            calibration=record,
            versions=versions,
            bytes_per_token=_bytes_per_token(plan, spec),
            weights_bytes=Sizes(base=plan.weights_bytes, compressed=final.weights_bytes),
            stages=[{"kind": stage.kind, **stage.model_dump(mode="json")} for stage in recipe.stages],
            layers=layers,
        )
        digests |= writer.write_file(
            work, writer.CARD_FILE, model_card(manifest, recipe, base_section(config)).encode()
        )
        manifest.files, manifest.headers, manifest.tensors = digests.files, digests.headers, digests.tensors
        writer.write_file(work, MANIFEST_FILE, manifest.to_bytes())
        work.publish()
    return replace(plan, spec=spec)


def _config_section(final: Checkpoint, spec: CodecSpec) -> dict[str, Any]:
    """What the stages that changed the weights said of them stays, or how the base model quantizes its own; the codec
    is added.
    """
    section = {"quant_method": QUANT_METHOD, "version": CONFIG_VERSION, "codec": spec.to_json()}
    before = final.config.get("quantization_config") or {}
    if before and not is_compressed(final.config):
        return {**section, BASE: before}
    return {**before, **section}


def _bytes_per_token(plan: Plan, spec: CodecSpec) -> BytesPerToken:
    base, compressed = plan.base_bytes_per_token, planning.bytes_per_token(spec, plan.geometry)
    return BytesPerToken(base=base, compressed=compressed, ratio=round(base / compressed, 4))


def _context(
    plan: Plan,
    original: Checkpoint,
    sample: Sampler,
    calibration: corpus.Calibration,
    options: Options,
    work: WorkDir,
    progress: Progress,
) -> Callable[[Checkpoint, ModelGeometry, str], Context]:
    """Makes a stage's context from the checkpoint it works on, its sizes, and the stage's name."""

    def make(checkpoint: Checkpoint, geometry: ModelGeometry, unit: str) -> Context:
        return Context(
            checkpoint=checkpoint,
            original=original,
            geometry=geometry,
            calibration=calibration,
            sample=sample,
            compressed_layers=plan.cache.layers,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
            work=work,
            unit=unit,
            progress=progress,
        )

    return make


class _Text:
    """Calibration text for a model: from a source of text, or, if `own` is set, from the model itself."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, options: Options, progress: Progress) -> None:
        self._seed, self._longest = options.seed, plan.geometry.context
        self._vocabulary, self._progress = plan.geometry.vocab_size, progress
        self._tokenizer = tokenizer.load(checkpoint.path)
        self.own: SelfText | None = None
        if options.calibration == SELF:
            self.own = SelfText(
                checkpoint,
                self._tokenizer,
                self._vocabulary,
                self._longest,
                options.seed,
                options.device,
                options.dtype,
                progress,
            )
        else:
            self._corpus = corpus.Corpus(options.calibration, self._tokenizer, self._vocabulary, progress)

    def sample(self, samples: int, length: int) -> corpus.Calibration:
        """So many samples of so many tokens, the latter capped by the model's context."""
        if self.own:
            return self.own.sample(samples, length)
        return self._corpus.sample(samples, min(length, self._longest), self._longest, self._seed)

    def bundled(self, length: int) -> corpus.Calibration:
        """One sample of the built-in text, whatever is calibrated on."""
        found = corpus.Corpus(corpus.BUILTIN, self._tokenizer, self._vocabulary, lambda *_: None)
        return found.sample(1, min(length, self._longest), self._longest, 0)


def _prompt(text: _Text, vocab_size: int) -> list[int]:
    """What the codec makes its statement on."""
    from kvcompress.codec import canary

    try:
        tokens: list[int] = text.bundled(canary.PROMPT_TOKENS).tokens_NT[0].tolist()
    except ValueError:  # the tokenizer is not for text of this kind
        return canary.unstated_prompt(vocab_size)
    return tokens


def _cache_codec(
    plan: Plan, context: Context, prompt: Callable[[], list[int]]
) -> tuple[CodecSpec, dict[str, Tensor], list[dict[str, Any]], dict[str, Any] | None]:
    """The codec's spec and tensors, each layer as the manifest shows it, and what the codec states of itself."""
    from kvcompress.codec.file import to_tensors
    from kvcompress.pipeline.capture import capture
    from kvcompress.pipeline.fit import fit, spec_of
    from kvcompress.pipeline.measure import measure

    if not context.compressed_layers:
        return plan.spec, {}, [_summary(plan, index, plan.spec, {}) for index in range(plan.geometry.num_layers)], None
    capture(context, plan.cache.needs)
    codecs = fit(plan.cache, context)
    errors, statement = measure(codecs, context, prompt)
    spec = spec_of(codecs)
    layers = [_summary(plan, index, spec, layer) for index, layer in enumerate(errors)]
    return spec, to_tensors(codecs), layers, statement


def _summary(plan: Plan, index: int, spec: CodecSpec, errors: dict[str, float]) -> dict[str, Any]:
    summary = planning.layer_summary(index, spec, plan.geometry)
    if errors:
        summary["relative_error"] = round(errors["both"], 6)
        summary["k"]["relative_error"] = round(errors["k"], 6)
        summary["v"]["relative_error"] = round(errors["v"], 6)
    for side in ("k", "v"):
        if f"{side}_clipped" in errors:
            summary[side]["clipped"] = round(errors[f"{side}_clipped"], 6)
    return summary


def _bytes_to_write(checkpoint: Checkpoint, plan: Plan, tokens: int) -> int:
    """Shards, once more for every stage that changes them, the codec twice (scratch and final), the hidden states of
    two layers, and what a fit keeps on disk.
    """
    geometry = plan.geometry
    per_head = geometry.num_kv_heads * (2 * geometry.head_dim**2 + 2 * geometry.head_dim) * 4 * 2
    codec = sum(getattr(layer, "tensor_bytes", per_head) for layer in plan.spec.layers)
    _, fit = plan.cache.fit_bytes(tokens)
    copies = 1 + sum(1 for _ in stages.transforms(plan.recipe))
    return copies * plan.weights_bytes + 2 * codec + fit + 2 * tokens * geometry.hidden_size * 4 + (1 << 20)
