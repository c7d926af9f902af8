"""What pages of all forms have in common. No torch."""

from __future__ import annotations

from typing import NamedTuple

TOKEN_MAJOR, FRAGMENT = "token_major", "fragment"
"""Orders of the bytes in a record: token by token (CPU, reference), or as a warp's lanes load them (CUDA)."""

CHUNK_TOKENS = 64
"""Tokens of a `fragment` record that lie together."""

PART_ALIGNMENT = 16
"""Bulk copies need parts on 16-byte boundaries; a block of a multiple of 16 tokens gives them without padding."""


class SideLayout(NamedTuple):
    """Where one side's parts begin inside a record, in the order of `SideSpec.part_bytes`; -1 for an absent one."""

    gain_offset: int
    outlier_offset: int
    channel_offset: int
    code_offset: int
