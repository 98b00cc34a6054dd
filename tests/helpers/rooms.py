"""Turns a device into the parts of its current stream's workspace, to poison and to look at."""

from __future__ import annotations

import torch
from torch import Tensor

from pa_ops import scratch


def parts(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(states, posts, counters and tickets), each int32."""
    room = scratch.workspace(device.index)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    posts, counters = scratch.posts_at(num_sms) // 4, scratch.counters_at(num_sms) // 4
    return room[:posts], room[posts:counters], room[counters:]


def poison(device: torch.device) -> Tensor:
    """Fill the room for states with NaN; it."""
    states = parts(device)[0].view(torch.float32)
    return states.fill_(torch.nan)


def as_it_began(device: torch.device) -> bool:
    """Whether kernels have left posts empty, and counters and tickets at zero."""
    _, posts, counters = parts(device)
    return bool((posts == scratch.EMPTY).all()) and not bool(counters.any())
