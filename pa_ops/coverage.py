"""Turns declared kernels, manifests, and test and bench evidence into one row per kernel and target, and the holes.

Everything here is a pure join: no file is read, and nothing is compiled or launched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.evidence import Evidence, Key
from pa_ops.families import unsupported
from pa_ops.heuristics import cheapest
from pa_ops.manifest import Entry, Manifest
from pa_ops.problem import Problem
from pa_ops.selection import Selection, select_entry
from pa_ops.spec import DType, Family, InstanceSpec, Op, TensorMask, Word

# Both sides of every row's head size, and the ends.
HEAD_DIMS = (8, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256, 264, 512)
DTYPES = (DType.FP16, DType.BF16, DType.FP32)
CACHE_DTYPES = (None, DType.E4M3FN, DType.INT8)  # None: the query's
# Tokens of the sequence and of a page: few query rows and many, which have a family each, and a page that not every
# family takes. Sizes rank and never refuse, so that page need not be met with both.
SIZES = {Op.PAGED_ATTENTION: ((1, 16), (512, 16), (512, 1))}
ANY_SIZE = ((1, None),)
# The options by which keys are hidden, of each operator.
_PLAIN_OPTIONS: tuple[Mapping[str, Any], ...] = ({"causal": False}, {"causal": True}, {"window": True})
_TENSOR_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"attn_mask": TensorMask.BOOL},
    {"attn_mask": TensorMask.ADDITIVE},
    {"attn_mask": TensorMask.BOOL, "mask_aligned": False},
    {"attn_mask": TensorMask.ADDITIVE, "mask_aligned": False},
    {"anchored": True},
)
HIDING_OPTIONS = {
    Op.PAGED_ATTENTION: _PLAIN_OPTIONS,
    Op.VARLEN_ATTENTION: _PLAIN_OPTIONS,
    Op.ATTENTION: (*_PLAIN_OPTIONS, *_TENSOR_OPTIONS),
}


class State(Word):
    """How far a kernel has come for one target."""

    REFUSED = "refused"
    DECLARED = "declared"
    GENERATED = "generated"
    COMPILED = "compiled"
    STALE = "stale"
    TESTED = "tested"
    BENCHMARKED = "benchmarked"


class Reach(Word):
    """How selection comes to a kernel."""

    AUTO = "auto"  # it is the best for some problem
    NAMED = "named"  # some problem gets it when its family is asked for by name; no other one
    NONE = "none"


class Refused(Protocol):
    """A kernel that is declared not to exist for a target, and why."""

    @property
    def spec(self) -> InstanceSpec: ...

    @property
    def target(self) -> str: ...

    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class Inputs:
    """What is joined.

    declared: kernels that a full build makes; refused: kernels that it does not; manifests: what was built; sources:
    rendered sources; digests: what a build made now would record; tests, bench: evidence; current: keys of
    evidence that is of today's sources, whatever compiled them.
    """

    declared: Sequence[tuple[InstanceSpec, str]]
    refused: Sequence[Refused] = ()
    manifests: Sequence[Manifest] = ()
    sources: frozenset[Key] = frozenset()
    digests: Mapping[Key, str] = field(default_factory=dict)
    tests: Mapping[Key, Evidence] = field(default_factory=dict)
    bench: Mapping[Key, Evidence] = field(default_factory=dict)
    current: frozenset[Key] = frozenset()


@dataclass(frozen=True)
class Cell:
    """One kernel for one target: its state, why, and what the compiler and the tests said (bytes, seconds)."""

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


@dataclass(frozen=True)
class Hole:
    """A problem of the declared domain that no row serves on an SM and that is not declared unsupported."""

    problem: Problem
    sm: int
    reason: str


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


def domain() -> Iterator[Problem]:
    """The declared problem domain: every operator, type, mask and option, at the sizes where rows change."""
    for op, dtype, kv_dtype, head_dim in product(Op, DTYPES, CACHE_DTYPES, HEAD_DIMS):
        if op is Op.MERGE_STATES and kv_dtype is not None:
            continue
        flags = (False, True) if op in HIDING_OPTIONS else (False,)
        hiding = HIDING_OPTIONS.get(op, ({"causal": False},))
        for hidden, extras, split, (tokens, page_size) in product(hiding, flags, flags, SIZES.get(op, ANY_SIZE)):
            yield Problem(
                op=op,
                dtype=dtype,
                kv_dtype=kv_dtype or dtype,
                head_dim=head_dim,
                head_dim_v=head_dim + 8 if split else head_dim,
                **hidden,
                softcap=extras,
                sinks=extras,
                page_size=page_size,
                tokens=tokens,
            )


def survey(entries: Iterable[Entry], sms: Iterable[int] = tuple(MODELS)) -> tuple[dict[Key, Reach], tuple[Hole, ...]]:
    """The rows that selection picks for some problem of the domain on some SM, and the problems that it cannot serve.

    A hole is told once, whatever its sizes, for the oldest SM that shows it; problems that are declared unsupported are
    no holes.
    """
    rows, problems = tuple(entries), tuple(domain())
    reached: dict[Key, Reach] = {}
    holes: dict[tuple[object, ...], Hole] = {}
    for sm in sorted(sms):
        capability = Capability.of_sm(sm)
        loadable = [row for row in rows if not set(row.code_targets).isdisjoint(capability.targets)]
        alike: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
        for row in loadable:
            alike[_kind(row.spec)].append(row)
        for problem in problems:
            if unsupported(problem, capability) is not None:
                continue
            try:
                selection = select_entry(alike[_kind(problem)], problem, capability)
            except NoInstance:
                if problem.facts not in holes:
                    holes[problem.facts] = Hole(problem, sm, _refusal(loadable, problem, capability))
                continue
            reached |= {key: Reach.NAMED for key in _bests(selection, problem, capability) if key not in reached}
            reached[selection.entry.name, selection.entry.target] = Reach.AUTO
    return reached, tuple(holes.values())


def _refusal(rows: Iterable[Entry], problem: Problem, capability: Capability) -> str:
    """What selection says of all rows, none of which can serve the problem."""
    try:
        entry = select_entry(rows, problem, capability).entry
    except NoInstance as error:
        return str(error)
    raise AssertionError(f"{entry.name} serves {problem}, and is of another kind")


def _kind(asked: InstanceSpec | Problem) -> tuple[object, ...]:
    """What a row and a problem that it serves always share: a tenth of the rows is left to be looked at."""
    op = asked.op if isinstance(asked, InstanceSpec) else asked.kernel_op
    return op, asked.dtype, asked.kv_dtype, asked.layout


def _bests(selection: Selection, problem: Problem, capability: Capability) -> Iterator[Key]:
    """The row that each family which may serve the problem would serve it with, if it were asked for."""
    able: dict[Family, list[Entry]] = defaultdict(list)
    for verdict in selection.reasons:
        if verdict.eligible:
            able[verdict.entry.spec.family].append(verdict.entry)
    for rows in able.values():
        best = cheapest(rows, problem, capability)
        yield best.name, best.target


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
        if key in built:
            cells.append(_built_cell(built[key], inputs, reached, declared, digests))
        elif key in declared:
            state = State.GENERATED if key in inputs.sources else State.DECLARED
            smem_bytes = declared[key].smem_bytes
            cells.append(Cell(*key, state, reach=reached.get(key, Reach.NONE), smem_bytes=smem_bytes))
        else:
            cells.append(Cell(*key, State.REFUSED, refused[key].reason))
    return Coverage(tuple(cells), holes)


def _built_cell(
    entry: Entry, inputs: Inputs, reached: Mapping[Key, Reach], declared: Mapping[Key, Entry], digests: set[str]
) -> Cell:
    key = (entry.name, entry.target)
    (shown, tests), (_, bench) = (_evidence_of(key, rows) for rows in (inputs.tests, inputs.bench))
    state, reason = _built_state(entry, inputs.digests.get(key), tests, bench, digests)
    todays = inputs.digests.get(key, entry.digest) == entry.digest
    if state is State.STALE and todays and tests is not None and shown in inputs.current:
        tools = ", ".join(f"{tool} {version}" for tool, version in sorted(tests.tools.items()))
        state, reason = State.COMPILED, f"tests ran on these sources as compiled by {tools}"
    if key not in declared:
        state, reason = State.STALE, "built, and no longer declared"
    mine = tests if tests is not None and tests.digest == entry.digest else Evidence("")
    return Cell(
        entry.name,
        entry.target,
        state,
        reason,
        reached.get(key, Reach.NONE),
        entry.registers,
        entry.spill_bytes,
        entry.smem_bytes,
        entry.object_bytes,
        entry.compile_seconds,
        mine.tests,
        mine.worst_error,
        mine.commit,
        mine.card,
    )


def _evidence_of(key: Key, rows: Mapping[Key, Evidence]) -> tuple[Key, Evidence | None]:
    """The evidence for a kernel and the key that it is found by, which tells no target in files of schema 1."""
    found = key if key in rows else (key[0], "")
    return found, rows.get(found)


def _built_state(
    entry: Entry, expected: str | None, tests: Evidence | None, bench: Evidence | None, digests: set[str]
) -> tuple[State, str]:
    """The state of a built kernel: evidence counts for the very digest that it was gathered on."""
    if expected is not None and expected != entry.digest:
        return State.STALE, f"built from {entry.digest[:12]}, its sources are now {expected[:12]}"
    if tests is None or not tests.tests:
        return State.COMPILED, ""
    if tests.digest == entry.digest:
        timed = bench is not None and bench.digest == entry.digest
        return (State.BENCHMARKED if timed else State.TESTED), ""
    if tests.digest in digests:
        return State.COMPILED, ""  # the evidence belongs to the same kernel built for another target
    return State.STALE, f"tests ran on {tests.digest[:12]}, built is {entry.digest[:12]}"
