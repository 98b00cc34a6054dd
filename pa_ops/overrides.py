"""Turns `backend=`, the context managers and the environment into the one policy that selection obeys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from pa_ops.environment import Settings, settings
from pa_ops.selection import AUTO, Policy

REFERENCE = "reference"

_BACKEND: ContextVar[str] = ContextVar("pa_ops_backend", default=AUTO)
_INVARIANT: ContextVar[bool] = ContextVar("pa_ops_batch_invariant", default=False)
BLOCKS: tuple[ContextVar[Any], ...] = (_BACKEND, _INVARIANT)  # what the context managers below set


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside the block, attention runs on the family `name` ("flash_sm80", or its first words: "flash"), or raises.

    Weaker than a call's own `backend=`, stronger than PA_OPS_BACKEND; "auto" lifts an outer block's choice.
    """
    token = _BACKEND.set(name)
    try:
        yield
    finally:
        _BACKEND.reset(token)


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside the block, a sequence's bits depend on nothing but itself (PA_OPS_BATCH_INVARIANT=1 does it everywhere).

    Selection then ranks kernels without looking at sizes, but for a sequence's own rows, and leaves out a family that
    cuts a sequence where its neighbours' lengths say (mea_decode). decode cuts it where its own length says, flash_sm90
    nowhere. The others need no more than that: a block walks one sequence's keys in one fixed order, whatever else is
    in the batch.
    """
    token = _INVARIANT.set(enabled)
    try:
        yield
    finally:
        _INVARIANT.reset(token)


Token = tuple[str, bool, int]


def token(now: Settings) -> Token:
    """A cheap key of what overrides a call from outside; it holds while the caller keeps `now`, whose id is in it."""
    return _BACKEND.get(), _INVARIANT.get(), id(now)


def policy(name: str = AUTO) -> Policy:
    """The policy of a call that asked for the backend `name`: the call, else the block, else the environment."""
    forced = _BACKEND.get()
    if name == AUTO and forced != AUTO:
        chosen = settings().policy(forced, source="pa_ops.backend()")
    else:
        chosen = settings().policy(name)
    return replace(chosen, batch_invariant=True) if _INVARIANT.get() else chosen
