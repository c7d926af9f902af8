"""Where every byte of a cache page lies: the single source for Python, C++ and CUDA. No torch.

A page holds `block_size` tokens of one layer and one KV head as one contiguous record; the cache of a layer is
`uint8 [num_blocks, num_kv_heads, record_bytes]`. The `token_major` record is

    k_gain  fp16 [block_size]              (absent when keys are stored in 16 bits)
    v_gain  fp16 [block_size]              (absent when values are stored in 16 bits)
    k_codes uint8 [block_size, k_code_bytes]
    v_codes uint8 [block_size, v_code_bytes]

Within a token's codes the bands follow each other; within a band, channel c of b bits sits in byte c*b//8 at bit
c*b%8 (little-endian; 16-bit channels are little-endian IEEE halves). Every part starts on a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.codec.spec import GAIN_BYTES, LayerSpec

PART_ALIGNMENT = 16
"""Bulk copies need parts on 16-byte boundaries; a block of a multiple of 16 tokens gives them without padding."""


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets inside one record. A gain offset of -1 means that side has no gain."""

    block_size: int
    num_kv_heads: int
    k_code_bytes: int
    v_code_bytes: int
    k_gain_offset: int
    v_gain_offset: int
    k_code_offset: int
    v_code_offset: int
    record_bytes: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of one layer, all KV heads."""
        return self.num_kv_heads * self.record_bytes

    @classmethod
    def of(cls, layer: LayerSpec, block_size: int) -> PageLayout:
        """Lay out pages of `block_size` tokens.

        Raises:
            ValueError: block_size is not a positive multiple of 16.
        """
        if block_size <= 0 or block_size % PART_ALIGNMENT:
            raise ValueError(
                f"block size is {block_size}; compressed pages need a positive multiple of {PART_ALIGNMENT}"
            )
        offset = 0

        def take(size: int) -> int:
            nonlocal offset
            start = offset
            assert start % PART_ALIGNMENT == 0
            offset += size
            return start

        k_gain = take(GAIN_BYTES * block_size) if layer.k.has_gain else -1
        v_gain = take(GAIN_BYTES * block_size) if layer.v.has_gain else -1
        k_code = take(layer.k.code_bytes * block_size)
        v_code = take(layer.v.code_bytes * block_size)
        assert offset == block_size * (layer.k.bytes_per_token + layer.v.bytes_per_token)
        return cls(
            block_size=block_size,
            num_kv_heads=layer.num_kv_heads,
            k_code_bytes=layer.k.code_bytes,
            v_code_bytes=layer.v.code_bytes,
            k_gain_offset=k_gain,
            v_gain_offset=v_gain,
            k_code_offset=k_code,
            v_code_offset=v_code,
            record_bytes=offset,
        )
