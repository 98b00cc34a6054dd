"""Turns every call into a record of what served it, so that a test can prove which kernel ran."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pa_ops.environment import Settings

KEPT = 256


@dataclass(frozen=True)
class Decision:
    """One call: the operator, the family that served it, the instance's name, why every other row did not."""

    op: str
    family: str
    instance: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"pa_ops: {self.op} -> {self.family} ({self.instance})" + "".join(f"\n  {why}" for why in self.reasons)


_history: deque[Decision] = deque(maxlen=KEPT)
_recordings: list[list[Decision]] = []


def record(now: Settings, *decisions: Decision) -> None:
    """Adds a call's launches to the history and to every open recording; prints them where the settings say so."""
    _history.extend(decisions)
    for calls in _recordings:
        calls.extend(decisions)
    if now.debug:
        print(*decisions, sep="\n", file=sys.stderr)


def last() -> Decision | None:
    """The latest call, None before the first."""
    return _history[-1] if _history else None


def history() -> tuple[Decision, ...]:
    """The latest calls, oldest first; at most KEPT."""
    return tuple(_history)


@contextmanager
def recording() -> Iterator[list[Decision]]:
    """Collects the calls made inside the block, from any thread: `with pa_ops.trace.recording() as calls:`."""
    calls: list[Decision] = []
    _recordings.append(calls)
    try:
        yield calls
    finally:
        _recordings[:] = [open_ for open_ in _recordings if open_ is not calls]
