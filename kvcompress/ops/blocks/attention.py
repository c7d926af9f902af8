"""Who works on pages of form `blocks`: chosen once per layer."""

from __future__ import annotations

import torch

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.ops import gpu, library
from kvcompress.ops.blocks import cpu, cuda
from kvcompress.ops.blocks.reference import BlocksOp


def bind(codec: BlocksCodec, device: torch.device | str) -> BlocksOp:
    """One layer's operations on a device: by CUDA kernels, CPU kernels, or torch where there are none that know it."""
    device = torch.device(device)
    codec = codec.to(device)
    kernels = gpu.kernels(device)
    if kernels is not None and cuda.covers(codec.spec):
        return cuda.CudaBlocks(kernels, codec)
    compiled = library.load() if device.type == "cpu" and cpu.covers(codec.spec) else None
    return BlocksOp(codec) if compiled is None else cpu.CpuBlocks(compiled, codec)
