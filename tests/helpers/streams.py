"""Turns calls into rounds of the same calls, each on a stream of its own, beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from helpers.problems import Call

ROUNDS = 20


def side_by_side(calls: Sequence[Call]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The results of each round, once the device is done with it."""
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(ROUNDS):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(call.run())
        torch.cuda.synchronize()
        yield results
