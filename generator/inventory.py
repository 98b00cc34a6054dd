"""Turns the matrix, the products on disk and the evidence files into what the coverage report joins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pa_ops.coverage import Evidence, Inputs
from pa_ops.manifest import FILE_NAME, Manifest

from . import matrix
from .layout import Layout
from .plan import Planner
from .targets import DECLARED_TARGETS, TARGETS
from .toolchain import Toolchain, ToolchainError

Key = tuple[str, str]


def manifests(home: Path) -> tuple[Manifest, ...]:
    """Every product below `home`, oldest target first."""
    paths = (home / target / FILE_NAME for target in TARGETS)
    return tuple(Manifest.load(path) for path in paths if path.is_file())


def _digests(targets: tuple[str, ...], templates: Path | None) -> dict[Key, str]:
    """What a build made now would record; empty where the compilers, which a digest covers, are not installed."""
    try:
        planner = Planner(Toolchain(), templates)
    except ToolchainError:
        return {}
    return {
        (spec.name, target): planner.item(spec, target).digest
        for target in targets
        for spec in matrix.declared("full", (target,))
    }


def _current(tests: Mapping[str, Evidence], targets: tuple[str, ...], templates: Path | None) -> frozenset[str]:
    """Instances whose evidence has the digest that their sources of today get from the compilers it names."""
    try:
        planner = Planner(Toolchain(), templates)
    except ToolchainError:
        return frozenset()
    specs = {spec.name: spec for target in targets for spec in matrix.declared("full", (target,))}
    return frozenset(
        name
        for name, evidence in tests.items()
        if name in specs and evidence.tools
        if any(planner.digest_by(specs[name], target, evidence.tools) == evidence.digest for target in targets)
    )


def inputs(
    home: Path,
    tests: Mapping[str, Evidence],
    bench: Mapping[str, Evidence],
    templates: Path | None = None,
) -> Inputs:
    """Everything known of every declared, refused or built kernel; targets are the declared ones and those built."""
    built = manifests(home)
    targets = tuple(dict.fromkeys((*DECLARED_TARGETS, *(manifest.target for manifest in built))))
    declared = [(spec, target) for target in targets for spec in matrix.declared("full", (target,))]
    sources = {(spec.name, target) for spec, target in declared if Layout(home / target).source(spec).is_file()}
    return Inputs(
        declared=declared,
        refused=matrix.refusals("full", targets),
        manifests=built,
        sources=frozenset(sources),
        digests=_digests(targets, templates),
        tests=tests,
        bench=bench,
        current=_current(tests, targets, templates),
    )
