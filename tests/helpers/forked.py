"""Turns a function into a process of its own, forked from this one: no second import of torch, which takes 2 s."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CLEAN, FAILED = 0, 3


@dataclass(frozen=True)
class Child:
    """A process that has begun; what it prints goes into files of `folder`."""

    pid: int
    folder: Path

    def end(self) -> tuple[int, str, str]:
        """Waits for it: CLEAN, FAILED or a signal's number below zero; its standard output and its errors."""
        _, status = os.waitpid(self.pid, 0)
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return os.waitstatus_to_exitcode(status), out, err


def start(work: Callable[[], object], folder: Path) -> Child:
    """Begins a process that does `work` and ends; an exception is printed there and makes it FAILED."""
    folder.mkdir()
    child = os.fork()
    if child:
        return Child(child, folder)
    status = FAILED
    try:
        for name, number in (("stdout", 1), ("stderr", 2)):
            file = (folder / name).open("w")
            os.dup2(file.fileno(), number)
            setattr(sys, name, file)
        status = _done(work)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whatever fails, no second process goes on with the tests
        os._exit(status)


def _done(work: Callable[[], object]) -> int:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        return FAILED
    return CLEAN
