"""Turns what a kernel could not do and passed over into words: one mask a device, raised by kernels, read on demand.

Reading waits for the device, so nothing in a call reads; PA_OPS_CHECKED=1 finds the same faults before the launch.
"""

from __future__ import annotations

from enum import IntFlag
from functools import lru_cache

import torch
from torch import Tensor


class Fault(IntFlag):
    """What was passed over; values as in templates/device/append.cuh."""

    NONE = 0
    POSITION = 1  # a token stands beyond the last row of cos and sin: it was rotated as the last row says
    SLOT = 2  # a token's page is unmapped or its slot lies outside the caches: it was not stored


@lru_cache(maxsize=64)
def mask_of(device: int) -> Tensor:
    """The mask of a CUDA device, [1] int32."""
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


def take_faults(device: torch.device | int | None = None) -> Fault:
    """The faults of every call on a CUDA device since the last time this was asked; synchronises.

    device: a device, its index, or None for the current one.
    """
    index = device.index if isinstance(device, torch.device) else device
    mask = mask_of(torch.cuda.current_device() if index is None else index)
    raised = int(mask.item())
    mask.zero_()
    return Fault(raised)
