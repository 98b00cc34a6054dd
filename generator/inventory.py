"""Turns the matrix, the products on disk and the evidence files into what the coverage report joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pa_ops.coverage import Inputs
from pa_ops.evidence import Evidence, Key
from pa_ops.manifest import FILE_NAME, Manifest
from pa_ops.spec import InstanceSpec

from . import matrix
from .layout import Layout
from .plan import Planner
from .targets import DECLARED_TARGETS, TARGETS
from .toolchain import Toolchain, ToolchainError

Declared = tuple[InstanceSpec, str]  # a kernel and its target


def manifests(home: Path) -> tuple[Manifest, ...]:
    """Every product below `home`, oldest target first."""
    paths = (home / target / FILE_NAME for target in TARGETS)
    return tuple(Manifest.load(path) for path in paths if path.is_file())


def _planner(templates: Path | None) -> Planner | None:
    """A planner for digests; none where the compilers, which they cover, are not installed."""
    try:
        return Planner(Toolchain(), templates)
    except ToolchainError:
        return None


def current(planner: Planner, tests: Mapping[Key, Evidence], declared: Sequence[Declared]) -> frozenset[Key]:
    """Keys of evidence with the digest that sources of today get from the compilers it names; without a target: any."""
    pairs = [(key, spec, target) for spec, target in declared for key in ((spec.name, target), (spec.name, ""))]
    return frozenset(
        key
        for key, spec, target in pairs
        if (shown := tests.get(key)) is not None and shown.tools
        if planner.digest_by(spec, target, shown.tools) == shown.digest
    )


def inputs(
    home: Path,
    tests: Mapping[Key, Evidence],
    bench: Mapping[Key, Evidence],
    templates: Path | None = None,
) -> Inputs:
    """Everything known of every declared, refused or built kernel; targets are the declared ones and those built."""
    built = manifests(home)
    targets = tuple(dict.fromkeys((*DECLARED_TARGETS, *(manifest.target for manifest in built))))
    declared = [(spec, target) for target in targets for spec in matrix.declared("full", (target,))]
    sources = {(spec.name, target) for spec, target in declared if Layout(home / target).source(spec).is_file()}
    planner = _planner(templates)
    digests = {(spec.name, target): planner.item(spec, target).digest for spec, target in declared} if planner else {}
    return Inputs(
        declared=declared,
        refused=matrix.refusals("full", targets),
        manifests=built,
        sources=frozenset(sources),
        digests=digests,
        tests=tests,
        bench=bench,
        current=current(planner, tests, declared) if planner else frozenset(),
    )
