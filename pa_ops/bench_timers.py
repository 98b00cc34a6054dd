"""Turns a call into its microseconds on the GPU: one by one, back to back, or in a loop of seconds.

They answer different questions. One by one, a call has its launch and an idle card before it. A loop of a second shows
what a card at its limit of power gives, and repeats to 0.5% there; so short a run as the others' depends on what the
card did just before, and two of one kernel differ by up to 14% (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from pa_ops.errors import InvalidArgument

Timer = Callable[[Callable[[], object]], float]
ONE_BY_ONE = 10, 50  # calls before the clock runs, and while it does
BACK_TO_BACK = 100, 500
LEAD_SECONDS = 0.3  # of the same calls before a loop's clock runs: limits of power take as long to act
MOST_SECONDS = 60.0
CHUNK = 20  # calls that are queued before those before them have ended


def one_by_one(call: Callable[[], object]) -> float:
    """The median time of a call, its launch included."""
    warm_up, repeats = ONE_BY_ONE
    for _ in range(warm_up):
        call()
    spans = [(_event(), _event()) for _ in range(repeats)]
    for begin, end in spans:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * float(median(begin.elapsed_time(end) for begin, end in spans))


def back_to_back(call: Callable[[], object], warm_up: int = BACK_TO_BACK[0], repeats: int = BACK_TO_BACK[1]) -> float:
    """The mean time of so many calls."""
    for _ in range(warm_up):
        call()
    begin, end = _event(), _event()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(begin.elapsed_time(end)) / repeats


def looping(seconds: float) -> Timer:
    """The timer that takes the mean of as many calls as fit so many seconds.

    Raises InvalidArgument, naming the option `loop`.
    """
    if not 0.0 < seconds <= MOST_SECONDS:
        raise InvalidArgument("loop", f"must be seconds, more than 0 and at most {MOST_SECONDS:.0f}", repr(seconds))

    def timer(call: Callable[[], object]) -> float:
        _loop(call, LEAD_SECONDS)
        return _loop(call, seconds)

    return timer


def _loop(call: Callable[[], object], seconds: float) -> float:
    """The mean time of calls over so many seconds: a chunk is queued while the one before it runs."""
    began, marks = perf_counter(), [_event()]
    marks[0].record()
    while len(marks) < 3 or perf_counter() - began < seconds:
        for _ in range(CHUNK):
            call()
        marks.append(_event())
        marks[-1].record()
        marks[-2].synchronize()
    torch.cuda.synchronize()
    return 1e3 * float(marks[0].elapsed_time(marks[-1])) / (CHUNK * (len(marks) - 1))


def _event() -> torch.cuda.Event:
    """A place in the stream's time, once it is recorded."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
