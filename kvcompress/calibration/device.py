"""Whether this machine has the device that calibration is asked to run on."""

from __future__ import annotations


def check_device(name: str) -> None:
    """Refuse, before any work, a device that torch cannot use here.

    Raises:
        ValueError: neither cpu nor a CUDA device that is there. Statistics are taken in float64, which leaves out
            devices without it, such as mps.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"found device {name!r}; expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(
            f"found device {name!r}; torch {torch.__version__} sees {count or 'no'} CUDA devices here; "
            f"use {f'cuda:0 to cuda:{count - 1}' if count else 'cpu'}"
        )
