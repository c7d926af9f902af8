"""Where every byte of a cache page lies: the single source for Python, C++ and CUDA. No torch.

A page holds `block_size` tokens of one layer and one KV head as one contiguous record; the cache of a layer is
`uint8 [num_blocks, num_kv_heads, record_bytes]`. The `token_major` record is

    k_gain     fp16  [block_size]              (absent when keys' code needs none: floats)
    v_gain     fp16  [block_size]              (absent when values' code needs none)
    k_outliers fp16  [block_size, k_outliers]  (what the codes leave of them; absent when keys have none)
    v_outliers fp16  [block_size, v_outliers]  (absent when values have none)
    k_channels uint8 [block_size, k_outliers]  (which channels they are, counted over all bands)
    v_channels uint8 [block_size, v_outliers]
    k_codes    uint8 [block_size, k_code_bytes]
    v_codes    uint8 [block_size, v_code_bytes]

Within a token's codes the bands follow each other; within a band, channel c of b bits sits in byte c*b//8 at bit
c*b%8 (little-endian; 16- and 32-bit channels are little-endian IEEE floats). Every part starts on a multiple of 16
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.codec.codes.registry import listed, widths
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import CHUNK_TOKENS, FRAGMENT, PART_ALIGNMENT, TOKEN_MAJOR, SideLayout


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets inside one record; in `fragment` order, inside one of its chunks."""

    block_size: int
    num_kv_heads: int
    k: SideLayout
    v: SideLayout
    record_bytes: int
    order: str = TOKEN_MAJOR

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of one layer, all KV heads."""
        return self.num_kv_heads * self.record_bytes

    @classmethod
    def of(cls, layer: HeadsSpec, block_size: int, order: str = TOKEN_MAJOR) -> PageLayout:
        """Lay out pages of `block_size` tokens.

        Raises:
            ValueError: block_size is not a positive multiple of 16, or of 64 in `fragment` order; or a band has a code
                that CUDA kernels do not unpack.
        """
        assert order in (TOKEN_MAJOR, FRAGMENT), order
        multiple = CHUNK_TOKENS if order == FRAGMENT else PART_ALIGNMENT
        if block_size <= 0 or block_size % multiple:
            raise ValueError(f"block size is {block_size}; compressed pages need a positive multiple of {multiple}")
        held = widths(lambda code: "cuda" in code.kernels)
        other = next((band.bits for band in (*layer.k.bands, *layer.v.bands) if band.bits not in held), None)
        if order == FRAGMENT and other:
            raise ValueError(f"found channels of {other} bits; pages in fragment order hold {listed(held)}")
        offset, tokens = 0, CHUNK_TOKENS if order == FRAGMENT else block_size
        starts: tuple[list[int], list[int]] = ([], [])
        for sizes in zip(layer.k.part_bytes, layer.v.part_bytes, strict=True):
            for start, size in zip(starts, sizes, strict=True):
                assert offset % PART_ALIGNMENT == 0
                start.append(offset if size else -1)
                offset += size * tokens
        record_bytes = block_size * (layer.k.bytes_per_token + layer.v.bytes_per_token)
        assert offset * (block_size // tokens) == record_bytes
        places = SideLayout(*starts[0]), SideLayout(*starts[1])
        return cls(block_size, layer.num_kv_heads, *places, record_bytes, order)
