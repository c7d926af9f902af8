"""Who works on records of form `shared`: chosen once per layer."""

from __future__ import annotations

import torch

from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.ops import gpu, library
from kvcompress.ops.shared import cpu, cuda
from kvcompress.ops.shared.reference import SharedOp


def bind(codec: SharedCodec, device: torch.device | str) -> SharedOp:
    """One layer's operations on a device: by CUDA kernels, CPU kernels, or torch where there are none that know it."""
    device = torch.device(device)
    codec = codec.to(device)
    kernels = gpu.kernels(device)
    if kernels is not None and cuda.covers(codec):
        return cuda.CudaShared(kernels, codec)
    compiled = library.load() if device.type == "cpu" and cpu.covers(codec) else None
    return SharedOp(codec) if compiled is None else cpu.CpuShared(compiled, codec)
