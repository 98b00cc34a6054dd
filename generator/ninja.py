"""Turns shards of stale instances into build.ninja, and runs it."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here, because a child of many threads may not take the loader's lock
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Edge:
    """One command of the graph."""

    rule: str
    command: str
    description: str
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...]


def shell(words: Sequence[str | Path]) -> str:
    """A command line that /bin/sh reads back as `words`."""
    return " ".join(shlex.quote(str(word)) for word in words)


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _value(text: str) -> str:
    return text.replace("$", "$$")


def _lines(edge: Edge) -> list[str]:
    lines = [f"rule {edge.rule}", f"  command = {_value(edge.command)}", f"  description = {_value(edge.description)}"]
    outputs = " ".join(map(_path, edge.outputs))
    inputs = " ".join(map(_path, edge.inputs))
    return [*lines, f"build {outputs}: {edge.rule} {inputs}", ""]


def text_of(edges: Sequence[Edge], folder: Path) -> str:
    """The text of build.ninja; its log goes to `folder`."""
    head = ["ninja_required_version = 1.8", f"builddir = {_path(folder)}", ""]
    return "\n".join([*head, *(line for edge in edges for line in _lines(edge))])


def _die_with_parent() -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that would change what the DSL emits, its file cache off."""
    kept = {key: value for key, value in environment.items() if not key.startswith(("CUTE_DSL_", "CUTLASS_"))}
    return {**kept, "CUTE_DSL_DISABLE_FILE_CACHING": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(program: Path, file: Path, jobs: int, tick: Callable[[], None], log: Path) -> tuple[int, str]:
    """Run ninja to its end, past failures; calls `tick` ten times a second. Returns its exit status and output.

    The child dies with this process, so that nothing writes into the products once the lock is gone.
    """
    command = [str(program), "-f", str(file), "-j", str(jobs), "-k", "0"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=clean_environment(os.environ),
            preexec_fn=_die_with_parent,
        )
        try:
            while True:
                try:
                    status = child.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    tick()
    return status, log.read_text(encoding="utf-8", errors="replace")
