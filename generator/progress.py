"""Turns what a build reports into a progress bar on a terminal, or into one line a target elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .listener import Listener
from .plan import Plan


class Waiting(Listener):
    """Says when another build is being waited for, and nothing else."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def waiting(self, owner: str) -> None:
        """Say who holds the products."""
        self._say(f"waiting for the build of {owner}")


class Display(Listener):
    """A rich progress bar for each target; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            auto_refresh=False,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def waiting(self, owner: str) -> None:
        """Say who holds the products."""
        self._console.print(f"waiting for the build of {owner}", markup=False)

    def planned(self, plan: Plan) -> None:
        """Say what there is to do, and start the target's bar."""
        fresh = len(plan.fresh) + len(plan.kept)
        what = f"{plan.target}: {len(plan.stale)} to compile, {fresh} up to date"
        if plan.dropped:
            what += f", {len(plan.dropped)} dropped (changed since they were built, or no longer declared)"
        self._console.print(what, markup=False, highlight=False)
        self._task = self._progress.add_task(plan.target, total=len(plan.stale), note="") if plan.stale else None

    def progressed(self, done: int, failed: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, note=f"{failed} failed" if failed else "", refresh=True)
