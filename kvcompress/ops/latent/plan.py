"""The C description of a cache of MLA latents."""

from __future__ import annotations

from torch import Tensor

from kvcompress.ops.interface.latent import Pages
from kvcompress.ops.rows import DTYPES


def latent_pages_struct(pages_NSC: Tensor) -> Pages:
    """The C description of a cache of MLA latents (`ops.latent`)."""
    return Pages(
        data=pages_NSC,
        num_blocks=pages_NSC.shape[0],
        block_stride=pages_NSC.stride(0),
        token_stride=pages_NSC.stride(1),
        block_size=pages_NSC.shape[1],
        channels=pages_NSC.shape[2],
        dtype=DTYPES[pages_NSC.dtype],
    )
