"""Turns a target's folder into a lock that one build at a time holds, and that tells who does."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from pa_ops.errors import PaOpsError

from .layout import Layout, write_atomically
from .listener import Listener


class BuildBusy(PaOpsError):
    """Another build held the products for too long; the text says who."""


@contextmanager
def locked(layout: Layout, seconds: float, listener: Listener) -> Iterator[None]:
    """Hold a target's products alone; the kernel drops the lock when its holder dies.

    Raises BuildBusy after `seconds`; `listener` hears before that whom it waits for.
    """
    layout.root.mkdir(parents=True, exist_ok=True)
    owner = layout.lock.with_name(".lock.owner")
    lock = FileLock(layout.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else "an unknown process"
        listener.waiting(who)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            text = f"{layout.root} is being built by {who}; waited {seconds:.0f} s. Let it end, or stop it"
            raise BuildBusy(text) from None
    try:
        write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
