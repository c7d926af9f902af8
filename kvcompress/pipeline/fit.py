"""Second pass: a basis for every layer, then an encoding for all of them together, which is the codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.codec.forms import CacheCodec, from_tensors, to_tensors
from kvcompress.codec.spec import CodecSpec
from kvcompress.methods.base import LayerBases, Profile
from kvcompress.methods.context import Context
from kvcompress.methods.registry import basis_of, encoding_of

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.methods.base import LatentBasis
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
    encoding, encoding_stage = encoding_of(recipe)
    bases = basis.fit_model(basis_stage, context)
    try:
        specs = encoding.layers(
            encoding_stage, context.geometry, [_profile(bases[i], context.statistics(i)) for i in sorted(bases)]
        )
    except ValueError as error:
        raise recipe.locate(encoding_stage, error) from None
    codecs: list[CacheCodec | None] = [None] * context.geometry.num_layers
    for index, spec in zip(sorted(bases), specs, strict=True):
        codecs[index] = encoding.codec(encoding_stage, spec, bases[index])
    return codecs


def _profile(bases: LayerBases, statistics: LayerStatistics) -> Profile:
    k_variance_R, v_variance_R = (side.variance_HR.mean(0).tolist() for side in (bases.k, bases.v))
    return Profile(
        len(k_variance_R),
        len(v_variance_R),
        k_variance_R,
        v_variance_R,
        _weight(bases.k, statistics.query_moment_HDD, statistics.key_sensitivity_H),
        _weight(bases.v, statistics.output_moment_HDD, statistics.value_sensitivity_H),
    )


def _weight(basis: LatentBasis, moment_HDD: Tensor, sensitivity_H: Tensor) -> float:
    """Squared error in the layer's output, relative to the residual stream, per unit of latent variance lost.

    An error d of a key or a value costs d^T M d, with M the moment of what it is multiplied by; an error of latent
    channel r is row r of `inverse`. In attention's metric that cost is 1 for every channel.
    """
    inverse_HRD, variance_HR = basis.inverse_HRD.double(), basis.variance_HR.double()
    cost_HR = ((inverse_HRD @ moment_HDD) * inverse_HRD).sum(-1)
    lost = float((sensitivity_H[:, None] * cost_HR * variance_HR).sum())
    return lost / max(float(variance_HR.mean(0).sum()), 1e-30)
