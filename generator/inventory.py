"""Turns the matrix, the products on disk and the evidence files into what the coverage report joins."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from pa_ops.capability import parse_target
from pa_ops.coverage import Inputs
from pa_ops.evidence import Evidence, Key, Timed
from pa_ops.homes import Unusable, manifest_in
from pa_ops.manifest import Manifest
from pa_ops.spec import InstanceSpec

from . import matrix
from .layout import Layout
from .plan import Planner
from .targets import REPORTED_TARGETS, TARGETS
from .toolchain import Toolchain, ToolchainError

Declared = tuple[InstanceSpec, str]  # a kernel and its target


def manifests(home: Path) -> tuple[Manifest, ...]:
    """Every product below `home`, oldest target first; one whose manifest cannot be read is left out with a warning."""
    found = [manifest_in(home / target) for target in TARGETS]
    for each in found:
        if isinstance(each, Unusable):
            warnings.warn(f"pa_ops: {each.folder} is not counted: {each.reason}", RuntimeWarning, stacklevel=2)
    return tuple(each for each in found if isinstance(each, Manifest))


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
    bench: Mapping[Key, Sequence[Timed]],
    uses: Mapping[str, tuple[str, ...]],
    templates: Path | None = None,
) -> Inputs:
    """Everything known of every declared, refused or built kernel; for every reported target and those built."""
    built = manifests(home)
    targets = tuple(dict.fromkeys((*REPORTED_TARGETS, *(manifest.target for manifest in built))))
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
        presets=presets(),
        uses=uses,
        lacking=lacking(targets, planner),
    )


def presets() -> dict[str, tuple[str, ...]]:
    """Which presets ask for an instance, by its name."""
    asked: dict[str, tuple[str, ...]] = {}
    for preset in matrix.PRESETS:
        for spec in matrix.candidates(preset):
            asked[spec.name] = (*asked.get(spec.name, ()), preset)
    return asked


def uses(path: Path, bench: Mapping[Key, Sequence[Timed]]) -> dict[str, tuple[str, ...]]:
    """Which programs ran an instance, by its name: those that wrote so to `path`, and the benchmarks."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ran = {"bench": sorted({name for name, _ in bench}), **told}
    names = {name for each in ran.values() for name in each}
    return {name: tuple(program for program, each in sorted(ran.items()) if name in each) for name in sorted(names)}


def lacking(targets: Sequence[str], planner: Planner | None) -> dict[str, str]:
    """Why the compilers that are here make no code for a target; nothing for those that they know."""
    if planner is None:
        return dict.fromkeys(targets, "the compilers are not installed here")
    known, version = planner.tools.nvrtc_sms, planner.tools.nvrtc_version
    return {
        target: f"NVRTC {version}, which is installed here, does not know it"
        for target in targets
        if parse_target(target) not in known
    }
