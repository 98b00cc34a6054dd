"""Turns a request and what lies on disk into the work of one target: what to compile, keep, drop and link."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pa_ops import arguments, sources
from pa_ops.errors import InvalidArgument
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import InstanceSpec

from . import matrix
from .digest import Digester, sha256_of
from .layout import Layout
from .link import FLAGS, HEADERS, SOURCES
from .render import Renderer
from .toolchain import Toolchain

HERE = Path(__file__).parent
COMPILE_SOURCES = (*(HERE / name for name in sources.COMPILING), Path(arguments.__file__))


def select(preset: str, target: str, pattern: str | None) -> tuple[InstanceSpec, ...]:
    """The instances of a preset for a target whose names match `pattern`: a glob, or several with commas between.

    Raises InvalidArgument when there is none, because a build of nothing is a mistake in the pattern.
    """
    specs = matrix.declared(preset, (target,))
    chosen = tuple(spec for spec in specs if pattern is None or matrix.matches(spec.name, pattern))
    if not chosen:
        example = specs[0].name if specs else "none"
        raise InvalidArgument("filter", f"must match one of {len(specs)} instances of {preset}, {example} say", pattern)
    return chosen


@dataclass(frozen=True)
class Item:
    """One instance of a plan: its rendered source and the digest of the object that it should have."""

    spec: InstanceSpec
    source: str
    digest: str

    @property
    def name(self) -> str:
        """The instance's name."""
        return self.spec.name


@dataclass(frozen=True)
class Plan:
    """The work of one target. `stale` compile; `fresh` and `kept` are up to date, the latter outside the selection;
    `dropped` were built once and leave the product, because their spec or their inputs changed.
    """

    target: str
    layout: Layout
    stale: tuple[Item, ...]
    fresh: tuple[Item, ...]
    kept: tuple[Item, ...]
    dropped: tuple[str, ...]
    published: bool

    @cached_property
    def product(self) -> tuple[Item, ...]:
        """Everything that the library will hold, by name."""
        return tuple(sorted((*self.stale, *self.fresh, *self.kept), key=lambda item: item.name))

    @property
    def done(self) -> bool:
        """Whether library and manifest already hold exactly this."""
        return self.published and not self.stale


def entry_of(layout: Layout, name: str) -> Entry | None:
    """The manifest row of a whole object on disk, None where object or facts are missing or do not fit together."""
    try:
        facts = json.loads(layout.facts(name).read_text(encoding="utf-8"))
        row, whole = facts["row"], sha256_of(layout.object(name)) == facts["image_sha256"]
        entry = Entry(symbol=name, **{**row, "code_targets": tuple(row["code_targets"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if entry.name == name and whole else None


class Planner:
    """Plans for one set of templates and tools."""

    def __init__(self, tools: Toolchain, templates: Path | None = None) -> None:
        self.tools = tools
        self.renderer = Renderer(templates)
        self.digester = self._digester()
        self.sources = sources.fingerprint(self.renderer.folder)
        self._foreign: dict[tuple[tuple[str, str], ...], Digester] = {}
        self._rendered: dict[InstanceSpec, str] = {}

    def _digester(self) -> Digester:
        return Digester(self.renderer, COMPILE_SOURCES, self.tools.compile_versions)

    def inputs_changed(self) -> bool:
        """Whether a file that workers read was edited since this planner first read it."""
        now = self._digester()
        return (now.common, now.modules) != (self.digester.common, self.digester.modules)

    def toolchain(self) -> dict[str, str]:
        """What the manifest records of tools and of the link's inputs."""
        linked = {path.name: sha256_of(path)[:16] for path in (*SOURCES, *HEADERS)}
        return {**self.tools.versions, **linked, "link": " ".join(FLAGS)}

    def item(self, spec: InstanceSpec, target: str) -> Item:
        """A rendered instance with its digest."""
        source = self._source(spec)
        return Item(spec, source, self.digester.digest(spec, target, source))

    def _source(self, spec: InstanceSpec) -> str:
        """The source of an instance, which is the same for all its targets."""
        if spec not in self._rendered:
            self._rendered[spec] = self.renderer.render(spec)
        return self._rendered[spec]

    def digest_by(self, spec: InstanceSpec, target: str, tools: Mapping[str, str]) -> str:
        """The digest that today's sources would get from compilers of other versions."""
        key = tuple(sorted(tools.items()))
        if key not in self._foreign:
            ours = self.tools.compile_versions
            theirs = {language: {name: tools.get(name, "") for name in names} for language, names in ours.items()}
            self._foreign[key] = Digester(self.renderer, COMPILE_SOURCES, theirs)
        return self._foreign[key].digest(spec, target, self._source(spec))

    def plan(self, layout: Layout, target: str, selected: Sequence[InstanceSpec]) -> Plan:
        """What a build of `selected` has to do, given the products that lie in `layout`."""
        stale: list[Item] = []
        fresh: list[Item] = []
        for spec in selected:
            item = self.item(spec, target)
            entry = entry_of(layout, spec.name)
            (fresh if entry is not None and entry.digest == item.digest else stale).append(item)
        kept, dropped = self._others(layout, target, {spec.name for spec in selected})
        plan = Plan(target, layout, tuple(stale), tuple(fresh), tuple(kept), tuple(dropped), published=False)
        return replace(plan, published=self._published(plan))

    def _others(self, layout: Layout, target: str, selected: set[str]) -> tuple[list[Item], list[str]]:
        """Rows built earlier and not asked for now: kept while declared and up to date."""
        declared = {spec.name: spec for spec in matrix.declared("full", (target,))}
        kept, dropped = [], []
        for path in sorted(layout.objects.glob("*.json")):
            if path.stem in selected:
                continue
            entry = entry_of(layout, path.stem)
            spec = declared.get(path.stem)
            item = self.item(spec, target) if spec is not None else None
            if entry is not None and item is not None and entry.digest == item.digest:
                kept.append(item)
            else:
                dropped.append(path.stem)
        return kept, dropped

    def _published(self, plan: Plan) -> bool:
        try:
            manifest = Manifest.load(plan.layout.manifest)
            same_library = manifest.library_sha256 == sha256_of(plan.layout.root / manifest.library)
        except (OSError, InvalidArgument, UnicodeDecodeError):
            return False
        have = {entry.name: entry.digest for entry in manifest.entries}
        want = {item.name: item.digest for item in plan.product}
        here = (plan.target, self.sources, self.toolchain())
        ours = (manifest.target, manifest.sources, dict(manifest.toolchain)) == here
        return same_library and have == want and ours
