"""Turns a request into products: sources, objects, one library a target and, last of all, its manifest."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pa_ops.arguments import record_of
from pa_ops.errors import BuildError, PaOpsError
from pa_ops.manifest import Manifest

from . import ninja, worker
from .digest import sha256_of
from .layout import TEMPORARY, Layout, write_atomically, write_if_changed
from .link import link
from .matrix import DEFAULT_PRESET, preset_of
from .plan import Item, Plan, Planner, entry_of, select
from .targets import default_targets, resolve_all
from .toolchain import Toolchain

SHARD_SIZE = 6  # instances a process: enough to pay for the import of the DSL, few enough to balance
WORKER_BYTES = 600 << 20  # a worker's peak is 0.5 GB
LOCK_SECONDS = 3600.0


@dataclass(frozen=True)
class Request:
    """What to build, and where: products go to home/<target>/.

    targets: words for architectures; empty: the preset's own, or the GPUs'. pattern: a glob on names, or several with
    commas between. jobs: processes
    at a time (0: as many as cores and memory allow). templates: in place of the installed ones. lock_seconds: how
    long to wait for another build of the same products.
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


class Listener:
    """Hears how a build gets on; this one stays silent."""

    def waiting(self, owner: str) -> None:
        """Another build holds the lock."""

    def planned(self, plan: Plan) -> None:
        """The work of a target is known."""

    def progressed(self, done: int, failed: int) -> None:
        """Instances compiled and failed so far."""


class BuildBusy(PaOpsError):
    """Another build held the products for too long; the text says who."""


def default_jobs() -> int:
    """Processes that cores and free memory allow, at least one."""
    cores = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, free // WORKER_BYTES))


@contextmanager
def _locked(layout: Layout, seconds: float, listener: Listener) -> Iterator[None]:
    """Hold a target's products alone; the kernel drops the lock when its holder dies."""
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


def _sweep(plan: Plan) -> None:
    """Remove what an interrupted build left, and every file that is no instance's of the product."""
    layout = plan.layout
    for folder in (layout.root, layout.sources, layout.objects, layout.link):
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f"*{TEMPORARY}", "*.error", "*.log", "*.request"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
    product = {path for item in plan.product for path in layout.files(item.spec)}
    for folder in (layout.objects, layout.sources):
        for path in folder.glob("pa_*"):
            if path.is_file() and path not in product:
                path.unlink()


def _cost(item: Item) -> tuple[int, str]:
    return -item.spec.head_dim, item.name


def shards_of(stale: Sequence[Item], jobs: int) -> list[list[Item]]:
    """Dear instances first, dealt out like cards: at most SHARD_SIZE a shard, and a shard for every job."""
    count = max(min(jobs, len(stale)), -(-len(stale) // SHARD_SIZE))
    return [sorted(stale, key=_cost)[i::count] for i in range(count)]


class TargetBuild:
    """The build of one plan, under its lock."""

    def __init__(self, planner: Planner, plan: Plan, jobs: int, listener: Listener) -> None:
        self.planner = planner
        self.plan = plan
        self.layout = plan.layout
        self.jobs = jobs
        self.listener = listener
        self.words = ""

    def run(self) -> None:
        """Compile, link and publish; raises BuildError naming the first instance that did not compile."""
        _sweep(self.plan)
        for item in self.plan.product:
            write_if_changed(self.layout.source(item.spec), item.source)
        for item in self.plan.stale:
            self.layout.facts(item.name).unlink(missing_ok=True)
        status = self._ninja(shards_of(self.plan.stale, self.jobs)) if self.plan.stale else 0
        if crashed := [item for item in self.plan.stale if not self._settled(item)]:
            status = self._ninja([[item] for item in crashed])
        self._raise_failures()
        if self.planner.inputs_changed():
            for item in self.plan.stale:
                self.layout.facts(item.name).unlink(missing_ok=True)
            raise BuildError(self.layout.linked.name, "compile", "templates changed while they were built; build again")
        if status != 0:
            raise BuildError(self.layout.linked.name, str(self.planner.tools.ninja), self.words)
        self._publish()

    def _settled(self, item: Item) -> bool:
        return self.layout.facts(item.name).is_file() or self.layout.failure(item.name).is_file()

    def _ninja(self, shards: Sequence[Sequence[Item]]) -> int:
        edges = [self._compile_edge(number, shard) for number, shard in enumerate(shards)]
        file = self.layout.root / "build.ninja"
        write_if_changed(file, ninja.text_of(edges, self.layout.link))
        log = self.layout.link / "ninja.log"
        status, self.words = ninja.run(self.planner.tools.ninja, file, self.jobs, self._tick, log)
        return status

    def _compile_edge(self, number: int, shard: Sequence[Item]) -> ninja.Edge:
        layout = self.layout
        request = layout.objects / f"shard_{number}.request"
        templates = self.planner.renderer.folder
        core = Path(sys.modules["pa_ops"].__path__[0])
        instances = [
            {
                "name": item.name,
                "digest": item.digest,
                "smem_bytes": item.spec.smem_bytes,
                "threads": item.spec.threads,
                "arguments": record_of(item.spec).size,
                "source": str(layout.source(item.spec)),
                "object": str(layout.object(item.name)),
                "facts": str(layout.facts(item.name)),
                "failure": str(layout.failure(item.name)),
                "log": str(layout.objects / f"{item.name}.log"),
            }
            for item in shard
        ]
        generator = Path(__file__).parent
        folders = {"pa_ops": core, "pa_ops.templates": templates, "pa_ops.generator": generator}
        document = {
            "target": self.plan.target,
            "packages": {name: str(folder) for name, folder in folders.items()},
            "include": str(templates / "device"),
            "nvrtc": str(self.planner.tools.nvrtc),
            "instances": instances,
        }
        write_atomically(request, json.dumps(document, indent=1))
        return ninja.Edge(
            rule=f"compile_{number}",
            command=f"exec {ninja.shell([sys.executable, worker.__file__, request])}",
            description=f"compile {len(shard)} instances for {self.plan.target}",
            outputs=tuple(path for item in shard for path in (layout.object(item.name), layout.facts(item.name))),
            inputs=(request,),
        )

    def _tick(self) -> None:
        done = sum(self.layout.facts(item.name).is_file() for item in self.plan.stale)
        failed = sum(self.layout.failure(item.name).is_file() for item in self.plan.stale)
        self.listener.progressed(done, failed)

    def _raise_failures(self) -> None:
        failed = [item for item in self.plan.stale if not self.layout.facts(item.name).is_file()]
        if not failed:
            return
        first = failed[0].name
        rest = "".join(f"\nand {item.name}" for item in failed[1:])
        path = self.layout.failure(first)
        if path.is_file():
            reason = json.loads(path.read_text(encoding="utf-8"))
            raise BuildError(first, reason["command"], reason["output"] + rest)
        log = self.layout.objects / f"{first}.log"
        words = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        raise BuildError(first, "the compile worker died", f"{words}{self.words}{rest}")

    def _publish(self) -> None:
        """Link, put the library in place, then the manifest, then remove what the manifest names no more."""
        layout = self.layout
        names = [item.name for item in self.plan.product]
        draft = layout.root / f"{layout.linked.name}{TEMPORARY}"
        shutil.copyfile(link(self.planner.tools, layout, names), draft)
        os.chmod(draft, 0o755)
        sha256 = sha256_of(draft)
        library = layout.library_of(sha256)
        entries = [entry_of(layout, name) for name in names]
        manifest = Manifest(
            target=self.plan.target,
            toolchain=self.planner.toolchain(),
            library=library.name,
            library_sha256=sha256,
            sources=self.planner.sources,
            entries=tuple(entry for entry in entries if entry is not None),
        )
        os.replace(draft, library)
        write_atomically(layout.manifest, manifest.dumps())
        for other in set(layout.libraries) - {library}:
            other.unlink()


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
            with _locked(layout, request.lock_seconds, listener):
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
