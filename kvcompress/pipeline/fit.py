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
from kvcompress.methods.registry import basis_of, encoding_of

if TYPE_CHECKING:
    from kvcompress.recipe import Recipe

UNIT = "fit"
_FILE = "codec.safetensors"


def fit(recipe: Recipe, context: Context) -> list[CacheCodec | None]:
    """The codec of every decoder layer; None where the cache stays as it is. Done once, however often resumed."""
    path = context.work.scratch(_FILE)
    if context.work.done(UNIT) and path.is_file():
        record = context.work.data(UNIT)
        if sha256_file(path) == record["sha256"]:
            return from_tensors(CodecSpec.from_json(record["codec"]), load_tensors(path))
    codecs = _fit(recipe, context)
    saved = save_tensors(path, to_tensors(codecs))
    context.work.commit(UNIT, {}, {"codec": spec_of(codecs).to_json(), "sha256": saved.sha256})
    return codecs


def spec_of(codecs: Sequence[CacheCodec | None]) -> CodecSpec:
    return CodecSpec(tuple(None if codec is None else codec.spec for codec in codecs))


def _fit(recipe: Recipe, context: Context) -> list[CacheCodec | None]:
    basis, basis_stage = basis_of(recipe)
    codecs: list[CacheCodec | None] = [None] * context.geometry.num_layers
    try:
        if basis.own_specs(basis_stage, context.geometry, context.compressed_layers) is not None:
            own = basis.own_codecs(basis_stage, context)
            for index, codec in zip(context.compressed_layers, own, strict=True):
                codecs[index] = codec
            return codecs
        bases = basis.fit_model(basis_stage, context)
    except ValueError as error:
        raise recipe.locate(basis_stage, error) from None
    encoding, encoding_stage = encoding_of(recipe)
    try:
        specs = encoding.specs(
            encoding_stage,
            context.geometry,
            [bases[index].profile(context.statistics(index)) for index in sorted(bases)],
        )
    except ValueError as error:
        raise recipe.locate(encoding_stage, error) from None
    for index, spec in zip(sorted(bases), specs, strict=True):
        codecs[index] = encoding.codec(encoding_stage, spec, bases[index])
    return codecs
