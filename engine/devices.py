"""The device that a name stands for, proved before anything is put on it."""

from __future__ import annotations

import torch


def find_device(device: str | torch.device, auto: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """``device``, or ``auto`` where it is "auto"; a tensor of ``dtype`` has been on it.

    ``meta`` holds no values, MPS has no float64, a torch without CUDA has no GPU: ValueError with the reason.
    """
    try:
        chosen = torch.device(auto if device == "auto" else device)
        torch.zeros(1, dtype=dtype, device=chosen).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # a torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {device!r} cannot be used for {dtype} here ({reason}): choose auto, cpu or another torch device"
        ) from error
    return chosen
