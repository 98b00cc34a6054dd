"""Turns a request into products, target by target: what each has to do, under its lock, and how that went."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pa_ops.errors import BuildError

from .layout import Layout
from .listener import Listener
from .lock import locked
from .matrix import DEFAULT_PRESET, preset_of
from .plan import Plan, Planner, select
from .target_build import TargetBuild
from .targets import default_targets, resolve_all
from .toolchain import Toolchain

WORKER_BYTES = 600 << 20  # a worker's peak is 0.5 GB
LOCK_SECONDS = 3600.0


@dataclass(frozen=True)
class Request:
    """What to build, and where: products go to home/<target>/.

    targets: words for architectures; empty: the preset's own, or the GPUs'. pattern: a glob on names, or several with
    commas between. jobs: processes at a time (0: as many as cores and memory allow). templates: in place of the
    installed ones. lock_seconds: how long to wait for another build of the same products.
    """

    home: Path
    preset: str = DEFAULT_PRESET
    targets: tuple[str, ...] = ()
    pattern: str | None = None
    jobs: int = 0
    templates: Path | None = None
    lock_seconds: float = LOCK_SECONDS

    def resolved_targets(self) -> tuple[str, ...]:
        """The targets that this request means, oldest SM first."""
        return resolve_all(self.targets) if self.targets else preset_of(self.preset).targets or default_targets()


@dataclass(frozen=True)
class Outcome:
    """One target's build: names compiled, names that were up to date, names dropped, seconds, the manifest."""

    target: str
    compiled: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float
    manifest: Path


def default_jobs() -> int:
    """Processes that cores and free memory allow, at least one."""
    cores = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, free // WORKER_BYTES))


def plans(request: Request, tools: Toolchain | None = None) -> Iterator[tuple[Planner, Plan]]:
    """What a build of `request` would do, target by target; reads, never writes."""
    planner = Planner(tools or Toolchain(), request.templates)
    for target in request.resolved_targets():
        layout = Layout(request.home / target)
        yield planner, planner.plan(layout, target, select(request.preset, target, request.pattern))


def build(
    request: Request,
    listener: Listener | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Outcome]:
    """Build every target of `request`; returns one outcome a target.

    Raises InvalidArgument for an unknown preset, target or an empty selection, ToolchainError for a missing tool,
    BuildError for a source that does not compile or link, BuildBusy when another build does not end.
    """
    listener = listener or Listener()
    tools = Toolchain()
    planner = Planner(tools, request.templates)
    outcomes = []
    for target in request.resolved_targets():
        began = clock()
        selected = select(request.preset, target, request.pattern)
        layout = Layout(request.home / target)
        try:
            with locked(layout, request.lock_seconds, listener):
                plan = planner.plan(layout, target, selected)
                listener.planned(plan)
                if not plan.done:
                    TargetBuild(planner, plan, request.jobs or default_jobs(), listener).run()
        except OSError as error:  # a full disk, most likely
            raise BuildError(target, f"write below {layout.root}", str(error)) from error
        compiled = tuple(item.name for item in plan.stale)
        fresh = tuple(item.name for item in (*plan.fresh, *plan.kept))
        outcomes.append(Outcome(target, compiled, fresh, plan.dropped, clock() - began, layout.manifest))
    return outcomes
