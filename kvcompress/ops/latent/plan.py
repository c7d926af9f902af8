"""The C description of a cache of MLA latents."""

from __future__ import annotations

from torch import Tensor

from kvcompress.ops.interface.latent import Pages
from kvcompress.ops.rows import DTYPES


def latent_pages_struct(pages_NSC: Tensor) -> Pages:
    """The C description of a cache of MLA latents (`ops.latent`)."""
    (blocks, block_size, channels), strides = pages_NSC.shape, pages_NSC.stride()
    data, dtype = pages_NSC.data_ptr(), DTYPES[pages_NSC.dtype]
    return Pages.plain(pages_NSC, data, blocks, strides[0], strides[1], block_size, channels, dtype)
