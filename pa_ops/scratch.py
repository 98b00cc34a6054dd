"""Turns a device and its current stream into the memory in which split attention leaves partial results.

Its size depends on the device alone. A stream has its own, so that calls on two streams never meet; graphs captured on
one stream share it, and must not be replayed at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pa_ops.program import stream_of

BLOCKS_AN_SM = 2
MAX_STATE_WORDS = 32 * (256 + 2)  # outputs, maximum and sum of a row, the most rows that a tile has

_held: dict[tuple[int, int], Tensor] = {}


def blocks_of(num_sms: int) -> int:
    """Blocks that share a batch's keys: as many as the device holds at a time."""
    return BLOCKS_AN_SM * num_sms


def counters_at(num_sms: int) -> int:
    """Where the arrival counters begin, in bytes: after two states a block."""
    return 2 * blocks_of(num_sms) * MAX_STATE_WORDS * 4


def workspace(device: int) -> Tensor:
    """The current stream's, [words] int32; made of zeros at the first call, and kept, for graphs may refer to it."""
    key = (device, stream_of(device))
    found = _held.get(key)
    if found is None:
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        words = counters_at(num_sms) // 4 + blocks_of(num_sms)
        found = _held[key] = torch.zeros(words, dtype=torch.int32, device=torch.device("cuda", device))
    return found
