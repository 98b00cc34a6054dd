"""Turns declared kernels, manifests, and test and bench evidence into one row per kernel and target, and the holes.

Everything here is a pure join: no file is read, and nothing is compiled or launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pa_ops.errors import InvalidArgument
from pa_ops.evidence import Evidence, Key, Timed
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import InstanceSpec, Word
from pa_ops.survey import Hole, Reach, survey


class State(Word):
    """How far a kernel has come for one target."""

    REFUSED = "refused"
    DECLARED = "declared"
    GENERATED = "generated"
    COMPILED = "compiled"
    STALE = "stale"
    TESTED = "tested"
    BENCHMARKED = "benchmarked"


class Fit(Word):
    """What evidence is of."""

    NONE = "none"  # there is none
    HERE = "this build"
    SOURCES = "these sources"  # built elsewhere from what lies here, perhaps by other compilers
    STALE = "stale"  # other sources


class Why(Word):
    """Why a kernel is not there for a target."""

    NOTHING = ""  # it is there
    TOOLCHAIN = "toolchain"  # no compiler makes code for that architecture
    SHARED_MEMORY = "shared memory"
    RULE = "rule"
    NOT_REQUESTED = "not requested"  # no build has been asked for it


class Refused(Protocol):
    """A kernel that is declared not to exist for a target, and why."""

    @property
    def spec(self) -> InstanceSpec: ...

    @property
    def target(self) -> str: ...

    @property
    def rule(self) -> str: ...

    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class Inputs:
    """What is joined.

    declared: kernels that a full build makes; refused: kernels that it does not; manifests: what was built; sources:
    rendered sources; digests: what a build made now would record; tests, bench: evidence; current: keys of
    evidence that is of today's sources, whatever compiled them; presets, uses: by instance name, which presets ask for
    it, and which programs ran it; lacking: by target, why the compilers that are here cannot make its code.
    """

    declared: Sequence[tuple[InstanceSpec, str]]
    refused: Sequence[Refused] = ()
    manifests: Sequence[Manifest] = ()
    sources: frozenset[Key] = frozenset()
    digests: Mapping[Key, str] = field(default_factory=dict)
    tests: Mapping[Key, Evidence] = field(default_factory=dict)
    bench: Mapping[Key, Sequence[Timed]] = field(default_factory=dict)
    current: frozenset[Key] = frozenset()
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    uses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One kernel for one target: its state, why, and what the compiler and the tests said (bytes, seconds).

    requested: presets that ask for it; why: why it is not there; fit: what its evidence is of, `tests` to `worst_test`;
    times: of this very code; stale_times: how many are of other code; used: programs that ran it.
    """

    name: str
    target: str
    state: State
    reason: str = ""
    reach: Reach = Reach.NONE
    registers: int = 0
    spill_bytes: int = 0
    smem_bytes: int = 0
    object_bytes: int = 0
    compile_seconds: float = 0.0
    tests: int = 0
    worst_error: float | None = None
    commit: str = ""
    card: str = ""
    by: tuple[str, ...] = ()
    worst_test: str = ""
    fit: Fit = Fit.NONE
    why: Why = Why.NOTHING
    requested: tuple[str, ...] = ()
    times: tuple[Timed, ...] = ()
    stale_times: int = 0
    used: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """The report: a cell per kernel and target, sorted; holes; unreachable kernels that are not refused."""

    cells: tuple[Cell, ...]
    holes: tuple[Hole, ...]

    @property
    def unreachable(self) -> tuple[Cell, ...]:
        """Declared kernels that selection never picks, whatever family is asked for."""
        return self.reached(Reach.NONE)

    def reached(self, how: Reach) -> tuple[Cell, ...]:
        """Kernels that selection comes to in that way, without those that are refused."""
        return tuple(cell for cell in self.cells if cell.reach is how and cell.state is not State.REFUSED)

    def count(self, state: State) -> int:
        """Cells in `state`."""
        return sum(cell.state is state for cell in self.cells)


def cover(inputs: Inputs) -> Coverage:
    """Join everything: a cell for each declared, refused or built kernel and target, and the holes of what is declared.

    Raises InvalidArgument when a kernel is both declared and refused for one target.
    """
    declared = {(spec.name, target): Entry.declared(spec, target) for spec, target in inputs.declared}
    refused = {(item.spec.name, item.target): item for item in inputs.refused}
    both = sorted(declared.keys() & refused.keys())
    if both:
        raise InvalidArgument("coverage", "a kernel is declared or refused for a target", f"both for {both[0]}")
    built = {(entry.name, entry.target): entry for manifest in inputs.manifests for entry in manifest.entries}
    reached, holes = survey(declared.values())
    digests = {entry.digest for entry in built.values()}
    cells = []
    for key in sorted({*declared, *refused, *built}):
        asked, used = inputs.presets.get(key[0], ()), inputs.uses.get(key[0], ())
        if key not in built and key not in declared:  # most: nothing else is known of them
            reason, why = refused[key].reason, _why(refused[key].rule)
            cells.append(Cell(*key, State.REFUSED, reason, why=why, requested=asked, used=used))
            continue
        cell = _built_cell(built[key], inputs, digests) if key in built else _declared_cell(declared[key], inputs)
        if key not in declared:
            cell = replace(cell, state=State.STALE, reason="built, and no longer declared")
        cells.append(replace(cell, reach=reached.get(key, Reach.NONE), requested=asked, used=used))
    return Coverage(tuple(cells), holes)


def _why(rule: str) -> Why:
    return {"shared-memory": Why.SHARED_MEMORY, "before-sm80": Why.TOOLCHAIN}.get(rule, Why.RULE)


def _declared_cell(entry: Entry, inputs: Inputs) -> Cell:
    """A kernel that no product here has; its evidence is from another machine, if there is any."""
    key = (entry.name, entry.target)
    lacking = inputs.lacking.get(entry.target, "")
    cell = Cell(
        *key,
        State.GENERATED if key in inputs.sources else State.DECLARED,
        lacking,
        smem_bytes=entry.smem_bytes,
        why=Why.TOOLCHAIN if lacking else Why.NOT_REQUESTED,
    )
    return _with_evidence(cell, inputs, "")


def _built_cell(entry: Entry, inputs: Inputs, digests: set[str]) -> Cell:
    key = (entry.name, entry.target)
    shown, tests = _evidence_of(key, inputs.tests)
    state, reason = _built_state(entry, inputs.digests.get(key), tests, digests)
    if state is State.TESTED and any(timed.digest == entry.digest for timed in inputs.bench.get(key, ())):
        state = State.BENCHMARKED
    todays = inputs.digests.get(key, entry.digest) == entry.digest
    if state is State.STALE and todays and tests is not None and shown in inputs.current:
        tools = ", ".join(f"{tool} {version}" for tool, version in sorted(tests.tools.items()))
        state, reason = State.COMPILED, f"tests ran on these sources as compiled by {tools}"
    cell = Cell(
        *key,
        state,
        reason,
        registers=entry.registers,
        spill_bytes=entry.spill_bytes,
        smem_bytes=entry.smem_bytes,
        object_bytes=entry.object_bytes,
        compile_seconds=entry.compile_seconds,
    )
    return _with_evidence(cell, inputs, entry.digest)


def _with_evidence(cell: Cell, inputs: Inputs, digest: str) -> Cell:
    """The cell with what tests and benchmarks showed, and what that is of; `digest` of its code, empty without."""
    key = (cell.name, cell.target)
    shown, tests = _evidence_of(key, inputs.tests)
    times = inputs.bench.get(key, ())
    mine = tuple(timed for timed in times if timed.digest in (digest, inputs.digests.get(key)))
    cell = replace(cell, times=mine, stale_times=len(times) - len(mine))
    if tests is None or not tests.tests:
        return cell
    here = tests.digest == digest
    if shown != key and not here and shown not in inputs.current:
        return cell  # of some target that the file does not tell
    fit = Fit.HERE if here else Fit.SOURCES if shown in inputs.current else Fit.STALE
    return replace(
        cell,
        fit=fit,
        tests=tests.tests,
        worst_error=tests.worst_error,
        commit=tests.commit,
        card=tests.card,
        by=tests.by,
        worst_test=tests.worst_test,
    )


def _evidence_of(key: Key, rows: Mapping[Key, Evidence]) -> tuple[Key, Evidence | None]:
    """The evidence for a kernel and the key that it is found by, which tells no target in files of schema 1."""
    found = key if key in rows else (key[0], "")
    return found, rows.get(found)


def _built_state(entry: Entry, expected: str | None, tests: Evidence | None, digests: set[str]) -> tuple[State, str]:
    """The state of a built kernel: evidence counts for the very digest that it was gathered on."""
    if expected is not None and expected != entry.digest:
        return State.STALE, f"built from {entry.digest[:12]}, its sources are now {expected[:12]}"
    if tests is None or not tests.tests:
        return State.COMPILED, ""
    if tests.digest == entry.digest:
        return State.TESTED, ""
    if tests.digest in digests:
        return State.COMPILED, ""  # the evidence belongs to the same kernel built for another target
    return State.STALE, f"tests ran on {tests.digest[:12]}, built is {entry.digest[:12]}"
