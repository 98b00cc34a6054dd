"""Turns tiles in their order into when the last is done, where each goes to the place that is free first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def end_of(lengths: Iterable[float], places: int) -> float:
    """When tiles of those lengths are done by so many places."""
    ends = [0.0] * places
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)
