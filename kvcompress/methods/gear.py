"""GEAR: quantization plus a low-rank residual plus exact outliers, a block of tokens at a time.

    X ~ D + A B^T + S          per block, KV head and side, on the latents of any basis

D: asymmetric uniform codes between the ends of a group; keys in groups along tokens (per channel), values in groups
along channels (per token). A B^T: rank-r residual by power iteration. S: a fixed share of entries, exact.
`codec.gear_blocks` has the arithmetic.

Source: Kang et al., GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM
(2024, arXiv 2403.05527); groups after KIVI (Liu et al., 2024, arXiv 2402.02750). Where the released code and the paper
differ, this follows the paper: every sequence has factors of its own, and the number of outliers is that of a block.
Latents are divided by their calibrated deviation first, because channels of unequal size cannot share a value's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from kvcompress.codec.blocks.spec import OUTLIER_GROUP, Axis, BlockSide, BlocksSpec
from kvcompress.codec.codes.registry import listed, quantized
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import EncodingMethod, LatentBasis, LayerBases, Profile
from kvcompress.methods.widths import QuantizedWidth
from kvcompress.recipe import Kind, Pair, StageConfig

if TYPE_CHECKING:
    from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec


class BitsPair(Pair):
    k: QuantizedWidth
    v: QuantizedWidth


class GearConfig(StageConfig):
    kind: ClassVar[Kind] = "encoding"
    method: Literal["gear"] = "gear"
    bits: BitsPair = Field(BitsPair(k=2, v=2), description=f"width of the codes: {listed(quantized())}")
    group: int = Field(64, ge=8, description="values that share a scale: tokens for keys, channels for values")
    rank: int = Field(2, ge=0, description="rank of the residual's factors per block and head; 0 for none")
    outliers: float = Field(0.02, ge=0.0, le=1.0, description="share of a block's entries kept exactly; 0 for none")
    block: int = Field(
        64, ge=16, multiple_of=16, description="tokens compressed together; vLLM's block size must be a multiple"
    )
    iterations: int = Field(3, ge=1, le=64, description="steps of the power iteration")

    @model_validator(mode="after")
    def _groups_divide_blocks(self) -> GearConfig:
        if self.group < self.block and self.block % self.group:
            raise ValueError(f"groups of {self.group} tokens do not divide a block of {self.block}; use a divisor")
        return self


class Gear(EncodingMethod[GearConfig]):
    name = "gear"
    summary = (
        f"{'/'.join(map(str, quantized()[::-1]))}-bit groups plus a low-rank residual plus exact outliers, per block "
        "of tokens; newest block exact"
    )
    paper = "GEAR, arXiv 2403.05527"
    config = GearConfig

    def layers(self, config: GearConfig, geometry: ModelGeometry, profiles: Sequence[Profile]) -> list[BlocksSpec]:
        return [
            BlocksSpec(
                geometry.num_kv_heads,
                geometry.head_dim,
                _side(config, config.bits.k, layer.k_rank, "tokens"),
                _side(config, config.bits.v, layer.v_rank, "channels"),
            )
            for layer in profiles
        ]

    def codec(self, config: GearConfig, spec: BlocksSpec, bases: LayerBases) -> BlocksCodec:
        from kvcompress.codec.blocks.codec import BlocksCodec

        return BlocksCodec(_side_codec(spec.k, bases.k), _side_codec(spec.v, bases.v))


def _side(config: GearConfig, bits: int, rank: int, along: Axis) -> BlockSide:
    entries = config.block * rank
    wanted = -(-round(config.outliers * entries) // OUTLIER_GROUP) * OUTLIER_GROUP
    return BlockSide(
        block=config.block,
        rank=rank,
        bits=bits,
        along=along,
        group=min(config.group, config.block if along == "tokens" else rank),
        low_rank=min(config.rank, config.block, rank),
        iterations=config.iterations,
        outliers=min(wanted, entries),
    )


def _side_codec(spec: BlockSide, basis: LatentBasis) -> BlockSideCodec:
    from kvcompress.codec.blocks.codec import BlockSideCodec

    kept = basis.cut(spec.rank)
    return BlockSideCodec(spec, kept.mean_HD, kept.basis_HDR, kept.inverse_HRD * basis.moved_H11, kept.scale_HR())
