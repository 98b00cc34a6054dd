"""Turns every call into a record of what served it, so that a test can prove which kernel ran."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pa_ops.environment import Settings

KEPT = 256


@dataclass(frozen=True)
class Decision:
    """One launch: the operator, the family that served it, the instance's name, why every other row did not."""

    op: str
    family: str
    instance: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"pa_ops: {self.op} -> {self.family} ({self.instance})" + "".join(f"\n  {why}" for why in self.reasons)


_history: deque[Decision] = deque(maxlen=KEPT)
SINKS: list[Callable[[tuple[Decision, ...]], None]] = [_history.extend]  # native.py's kernels call them too


def record(now: Settings, *decisions: Decision) -> None:
    """Adds a call's launches to the history and to every open recording; prints them where the settings say so."""
    for take in SINKS:
        take(decisions)
    if now.debug:
        print(*decisions, sep="\n", file=sys.stderr)


def last() -> Decision | None:
    """The latest launch, None before the first."""
    return _history[-1] if _history else None


def history() -> tuple[Decision, ...]:
    """The latest launches, oldest first; at most KEPT."""
    return tuple(_history)


@contextmanager
def recording() -> Iterator[list[Decision]]:
    """Collects the calls made inside the block, from any thread: `with pa_ops.trace.recording() as calls:`."""
    calls: list[Decision] = []
    take = calls.extend
    SINKS.append(take)
    try:
        yield calls
    finally:
        SINKS[:] = [sink for sink in SINKS if sink is not take]
