"""Second pass: a basis for every layer, then an encoding for all of them together, which is the codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.file import from_tensors, to_tensors
from kvcompress.codec.spec import CodecSpec
from kvcompress.methods.context import Context

if TYPE_CHECKING:
    from kvcompress.pipeline.resolve import CacheStages

UNIT = "fit"
_FILE = "codec.safetensors"


def fit(stages: CacheStages, context: Context) -> list[CacheCodec | None]:
    """The codec of every decoder layer; None where the cache stays as it is. Done once, however often resumed."""
    path = context.work.scratch(_FILE)
    if context.work.done(UNIT) and path.is_file():
        record = context.work.data(UNIT)
        if sha256_file(path) == record["sha256"]:
            return from_tensors(CodecSpec.from_json(record["codec"]), load_tensors(path))
    codecs = _fit(stages, context)
    saved = save_tensors(path, to_tensors(codecs))
    context.work.commit(UNIT, {}, {"codec": spec_of(codecs).to_json(), "sha256": saved.sha256})
    return codecs


def spec_of(codecs: Sequence[CacheCodec | None]) -> CodecSpec:
    return CodecSpec(tuple(None if codec is None else codec.spec for codec in codecs))


def _fit(stages: CacheStages, context: Context) -> list[CacheCodec | None]:
    codecs: list[CacheCodec | None] = [None] * context.geometry.num_layers
    try:
        if stages.own:
            own = stages.basis.own_codecs(stages.basis_stage, context, stages.specs)
            for index, codec in zip(stages.layers, own, strict=True):
                codecs[index] = codec
            return codecs
        bases = stages.basis.fit_model(stages.basis_stage, context, stages.profiles)
    except ValueError as error:
        raise stages.recipe.locate(stages.basis_stage, error) from None
    try:
        specs = stages.encoding.specs(
            stages.encoding_stage,
            context.geometry,
            [bases[index].profile(context.statistics(index)) for index in sorted(bases)],
        )
    except ValueError as error:
        raise stages.recipe.locate(stages.encoding_stage, error) from None
    for index, spec in zip(sorted(bases), specs, strict=True):
        codecs[index] = stages.encoding.codec(stages.encoding_stage, spec, bases[index])
    return codecs
