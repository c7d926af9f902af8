"""Who works on pages of form `heads`: chosen once per layer."""

from __future__ import annotations

import torch

from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import FRAGMENT, TOKEN_MAJOR
from kvcompress.ops import gpu, library
from kvcompress.ops.heads import cpu, cuda
from kvcompress.ops.heads.reference import HeadsOp


def order(layer: HeadsSpec, device: torch.device) -> str:
    """Of the bytes in a page, for whom `bind` will choose."""
    kernels = gpu.kernels(device)
    return TOKEN_MAJOR if kernels is None or not cuda.covers(kernels, layer) else FRAGMENT


def bind(codec: HeadsCodec, device: torch.device | str) -> HeadsOp:
    """One layer's operations on a device: by CUDA kernels, CPU kernels, or torch where there are none that know it."""
    device = torch.device(device)
    codec = codec.to(device)
    if order(codec.spec, device) == FRAGMENT:
        kernels = gpu.kernels(device)
        assert kernels is not None
        return cuda.CudaHeads(kernels, codec)
    compiled = library.load() if device.type == "cpu" and cpu.covers(codec.spec) else None
    return HeadsOp(codec) if compiled is None else cpu.CpuHeads(compiled, codec)
