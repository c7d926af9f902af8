"""Who works on pages of form `latent`: chosen once per layer."""

from __future__ import annotations

import torch

from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.ops import gpu, library
from kvcompress.ops.latent import cpu, cuda
from kvcompress.ops.latent.reference import LatentOp


def bind(codec: LatentCodec, device: torch.device | str, dtype: torch.dtype) -> LatentOp:
    """A layer's operations on a device: by CUDA kernels, CPU kernels, or torch where there are none that know it.

    Args:
        dtype: of cache, keys and queries.
    """
    device, channels = torch.device(device), codec.spec.head_dim
    kernels = gpu.kernels(device)
    if kernels is not None and cuda.covers(kernels, channels, dtype):
        return cuda.CudaLatent(kernels, device)
    compiled = library.load() if device.type == "cpu" and cpu.covers(channels, dtype) else None
    return LatentOp() if compiled is None else cpu.CpuLatent(compiled)
