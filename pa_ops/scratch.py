"""Turns a device and its current stream into the memory in which split attention leaves partial results.

Its size depends on the device alone. A stream has its own, so that calls on two streams never meet; graphs captured on
one stream share it, and must not be replayed at the same time. Posts must be empty and counters zero when a kernel
begins, and it leaves them so; what is filled under capture is so in that graph's replays alone, and is therefore not
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pa_ops.arguments import STATES_A_BLOCK, WIDEST_POST, WIDEST_STATE
from pa_ops.program import stream_of

BLOCKS_AN_SM = 2
MAX_STATE_WORDS = 16 * WIDEST_STATE  # as many rows as a tile has
MAX_POST_WORDS = 16 * WIDEST_POST
MOST_WARPS = 12  # of a block of flash_sm90 that compute
PARTS_AN_SM = 4  # of tiles, that is: STATES of templates/device/parts.py
EMPTY = -1  # a word that has not been posted: templates/device/posts.py

held: dict[tuple[int, int], Tensor] = {}
"""Device and stream -> the workspace that is the stream's for good."""
_spare: dict[int, Tensor] = {}  # one a device, for the first stream that is met while it is being captured


def blocks_of(num_sms: int) -> int:
    """Blocks that share a batch's keys: as many as the device holds at a time."""
    return BLOCKS_AN_SM * num_sms


def posts_at(num_sms: int) -> int:
    """Where the posts begin, in bytes: after the states."""
    return STATES_A_BLOCK * blocks_of(num_sms) * MAX_STATE_WORDS * 4


def counters_at(num_sms: int) -> int:
    """Where the arrival counters begin, in bytes: after the posts."""
    return posts_at(num_sms) + blocks_of(num_sms) * MAX_POST_WORDS * 4


def tickets_at(num_sms: int) -> int:
    """Where the counter of shares that blocks have taken lies, in bytes: after the arrival counters."""
    return counters_at(num_sms) + 4 * blocks_of(num_sms)


def tiles_at(num_sms: int) -> int:
    """Where the counter of tiles that blocks have taken lies, in bytes: it has its own, for both may run at a time."""
    return tickets_at(num_sms) + 4


def second_tiles_at(num_sms: int) -> int:
    """Where the counter of tiles lies for the second of two grids that share a batch out, in bytes."""
    return tiles_at(num_sms) + 4


def parts_at(num_sms: int) -> int:
    """Where the counters begin at which warps with parts of a tile's keys arrive, in bytes."""
    return second_tiles_at(num_sms) + 4


def workspace_words(num_sms: int) -> int:
    """Words of the workspace: counters for the warps of as many parts of tiles as SMs may have are its end."""
    return parts_at(num_sms) // 4 + num_sms * PARTS_AN_SM * MOST_WARPS


def workspace(device: int) -> Tensor:
    """The current stream's, [words] int32, kept because graphs may refer to it; waits for the device once, when made.

    A stream that is first met under capture gets the spare one. Where that is gone it gets memory of the graph's own,
    which every replay fills first.
    """
    key = (device, stream_of(device))
    found = held.get(key)
    if found is None:
        if not torch.cuda.is_current_stream_capturing():
            found = held[key] = _made(device)
            _spare.setdefault(device, _made(device))
            torch.cuda.synchronize(device)
        elif device in _spare:
            found = held[key] = _spare.pop(device)
        else:
            found = _made(device)
    return found


def workspace_for(out: Tensor) -> Tensor | None:
    """The room that a call has whose result is `out`; None where no kernel will run."""
    return workspace(out.get_device()) if out.is_cuda else None


def _made(device: int) -> Tensor:
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    posts, counters = posts_at(num_sms) // 4, counters_at(num_sms) // 4
    fresh = torch.empty(workspace_words(num_sms), dtype=torch.int32, device=torch.device("cuda", device))
    fresh[posts:counters].fill_(EMPTY)
    fresh[counters:].zero_()
    return fresh
