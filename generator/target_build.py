"""Turns the plan of one target into its objects, library and manifest: by ninja, compile workers and the C compiler."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pa_ops.arguments import record_of
from pa_ops.errors import BuildError
from pa_ops.manifest import Manifest

from . import ninja, worker
from .digest import sha256_of
from .layout import TEMPORARY, write_atomically, write_if_changed
from .link import link
from .listener import Listener
from .plan import Item, Plan, Planner, entry_of

SHARD_SIZE = 6  # instances a process: enough to pay for the import of the DSL, few enough to balance


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
                "cluster": item.spec.tile.cluster,
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
