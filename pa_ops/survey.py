"""Turns rows into how selection comes to each, and into the problems of the declared domain that none serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import NoInstance
from pa_ops.evidence import Key
from pa_ops.families import families_of, family_passes, row_rejections
from pa_ops.heuristics import cost
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import select_entry
from pa_ops.spec import DType, Family, InstanceSpec, Op, TensorMask, Word
from pa_ops.unsupported import unsupported

# Both sides of every usual head size, and the ends; those of rows with another come on top.
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
    {"attn_mask": TensorMask.ADDITIVE_FP32},
    {"attn_mask": TensorMask.BOOL, "mask_aligned": False},
    {"attn_mask": TensorMask.ADDITIVE, "mask_aligned": False},
    {"anchored": True},
)
HIDING_OPTIONS = {
    Op.PAGED_ATTENTION: _PLAIN_OPTIONS,
    Op.VARLEN_ATTENTION: _PLAIN_OPTIONS,
    Op.ATTENTION: (*_PLAIN_OPTIONS, *_TENSOR_OPTIONS),
}


class Reach(Word):
    """How selection comes to a kernel."""

    AUTO = "auto"  # it is the best for some problem
    NAMED = "named"  # some problem gets it when its family is asked for by name; no other one
    NONE = "none"


@dataclass(frozen=True)
class Hole:
    """A problem of the declared domain that no row serves on an SM and that is not declared unsupported."""

    problem: Problem
    sm: int
    reason: str


def domain(head_dims: Iterable[int] = HEAD_DIMS) -> Iterator[Problem]:
    """The declared problem domain: every operator, type, mask and option, at the sizes where rows change."""
    for op, dtype, kv_dtype, head_dim in product(Op, DTYPES, CACHE_DTYPES, head_dims):
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
    rows = tuple(entries)
    sizes: dict[tuple[object, ...], list[Problem]] = defaultdict(list)
    sides = {side for row in rows for side in (row.spec.head_dim, row.spec.head_dim + 8) if row.spec.head_dim}
    for problem in domain(sorted({*HEAD_DIMS, *sides})):
        sizes[problem.facts].append(problem)
    reached: dict[Key, Reach] = {}
    holes: dict[tuple[object, ...], Hole] = {}
    for capability in _devices(rows, sms):
        loadable = [row for row in rows if not set(row.code_targets).isdisjoint(capability.targets)]
        fitting = _Fitting(loadable, capability)
        for facts, problems in sizes.items():
            first = problems[0]
            if unsupported(first, capability) is not None:
                continue
            able = fitting.able(first)
            if not able and facts not in holes:
                holes[facts] = Hole(first, capability.sm, _refusal(loadable, first, capability))
            for problem in problems if able else ():
                _reach(able, problem, capability, reached)
    return reached, tuple(holes.values())


def _devices(rows: Sequence[Entry], sms: Iterable[int]) -> Iterator[Capability]:
    """The oldest SM of each kind of device that no row and no gate tells apart.

    Their numbers of SMs do not matter: no problem of the domain has more tiles than the smallest device has SMs.
    """
    targets = {target for row in rows for target in row.code_targets}
    kinds: dict[tuple[object, ...], Capability] = {}
    for sm in sorted(sms):
        capability = Capability.of_sm(sm)
        loads = tuple(target for target in capability.targets if target in targets)
        kinds.setdefault((capability.features, capability.smem_optin_bytes, loads), capability)
    yield from kinds.values()


class _Fitting:
    """The rows of a device that fit a problem's own axes, looked for once for all problems that share them."""

    def __init__(self, rows: Iterable[Entry], capability: Capability) -> None:
        self._capability = capability
        self._alike: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
        self._found: dict[tuple[object, ...], list[Entry]] = {}
        for row in rows:
            self._alike[_kind(row.spec)].append(row)

    def able(self, problem: Problem) -> list[Entry]:
        """The rows that no gate rejects, as `selection.verdicts` has them, without the reasons."""
        families = {each for each in families_of(problem.kernel_op) if family_passes(each, problem, self._capability)}
        return [row for row in self._rows(problem) if row.spec.family in families]

    def _rows(self, problem: Problem) -> list[Entry]:
        key = (*_kind(problem), problem.mask, problem.head_dim, problem.head_dim_v)  # all that row_rejections look at
        if key not in self._found:
            self._found[key] = [
                row
                for row in self._alike[_kind(problem)]
                if next(row_rejections(row, problem, self._capability), None) is None
            ]
        return self._found[key]


def _reach(able: Iterable[Entry], problem: Problem, capability: Capability, reached: dict[Key, Reach]) -> None:
    """Notes the row that runs, and the one that each other family would serve the problem with if asked for."""
    bests: dict[Family, Entry] = {}
    for row in sorted(able, key=lambda row: cost(row, problem, capability)):
        how = Reach.NAMED if bests else Reach.AUTO
        if bests.setdefault(row.spec.family, row) is row and reached.get((row.name, row.target)) is not Reach.AUTO:
            reached[row.name, row.target] = how


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
