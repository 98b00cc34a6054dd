"""Turns rows into how selection comes to each, and into the problems of the declared domain that none serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import NoInstance
from pa_ops.evidence import Key
from pa_ops.families import device_passes, device_rejections, problem_passes, problem_rejections
from pa_ops.gates import families_of
from pa_ops.heuristics import MANY_TOKENS, MIXED_TOKENS, leaders
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import select_entry
from pa_ops.spec import DType, Family, InstanceSpec, Op, TensorMask, Word
from pa_ops.unsupported import UNSUPPORTED, Unsupported, covering

# Both sides of every usual head size, and the ends; those of rows with another come on top.
HEAD_DIMS = (8, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256, 264, 512)
DTYPES = (DType.FP16, DType.BF16, DType.FP32)
CACHE_DTYPES = (None, DType.E4M3FN, DType.INT8)  # None: the query's


class Size(NamedTuple):
    """Tokens of all sequences and of a page, query heads of the one KV head, sequences."""

    tokens: int
    page_size: int | None = None
    group: int = 1
    batch: int = 1

    def problem(self, asked: Mapping[str, Any]) -> Problem:
        """The problem of this size that asks for so much else."""
        return Problem(
            **asked,
            page_size=self.page_size,
            tokens=self.tokens,
            batch=self.batch,
            num_heads=self.group,
            num_kv_heads=1,
        )


Sizes = tuple[Size, ...]
# Few query rows, which have a family of their own, many, very many of one sequence, whose keys blocks share, as many of
# some, whose keys fewer share, and of short ones with grouped heads, which have a tile of their own, with a window,
# too, and a page that not every family takes. Sizes rank and never refuse, so that page need not be met with each.
SOME_SEQUENCES = MANY_TOKENS // 6144
MANY_SEQUENCES = MANY_TOKENS // MIXED_TOKENS
SIZES: dict[Op, Sizes] = {
    Op.PAGED_ATTENTION: (
        Size(1, 16),
        Size(512, 16),
        Size(512, 1),
        Size(MANY_TOKENS, 16),
        Size(MANY_TOKENS, 16, 1, SOME_SEQUENCES),
        Size(MANY_TOKENS, 16, 4, MANY_SEQUENCES),
    ),
    Op.VARLEN_ATTENTION: (
        Size(1),
        Size(MANY_TOKENS),
        Size(MANY_TOKENS, None, 1, SOME_SEQUENCES),
        Size(MANY_TOKENS, None, 4, MANY_SEQUENCES),
    ),
}
ANY_SIZE: Sizes = (Size(1),)
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
    SHADOWED = "shadowed"  # where it loads, the same kernel's code for another target loads too, and goes first
    NONE = "none"


@dataclass(frozen=True)
class Hole:
    """A problem of the declared domain that no row serves on an SM and that is not declared unsupported."""

    problem: Problem
    sm: int
    reason: str


def questions(
    head_dims: Iterable[int], pairs: Iterable[tuple[int, int]] = ()
) -> Iterator[tuple[dict[str, Any], Sizes]]:
    """What problems of the domain ask but for their sizes, and those; attention by `pairs` of head sizes, too."""
    same = [(head_dim, head_dim) for head_dim in head_dims]
    split = [*((head_dim, head_dim + 8) for head_dim, _ in same), *pairs]
    for op, dtype, kv_dtype in product(Op, DTYPES, CACHE_DTYPES):
        if op is Op.MERGE_STATES and kv_dtype is not None:
            continue
        attends = op in HIDING_OPTIONS
        flags = (False, True) if attends else (False,)
        hiding = HIDING_OPTIONS.get(op, ({"causal": False},))
        for heads, hidden, extras in product([*same, *split] if attends else same, hiding, flags):
            asked: dict[str, Any] = {"op": op, "dtype": dtype, "kv_dtype": kv_dtype or dtype, **hidden}
            asked |= {"head_dim": heads[0], "head_dim_v": heads[1], "softcap": extras, "sinks": extras}
            yield asked, SIZES.get(op, ANY_SIZE)


def domain(head_dims: Iterable[int] = HEAD_DIMS) -> Iterator[Problem]:
    """The declared problem domain: every operator, type, mask and option, at the sizes where rows change."""
    for asked, sizes in questions(head_dims):
        yield from (size.problem(asked) for size in sizes)


def survey(entries: Iterable[Entry], sms: Iterable[int] = tuple(MODELS)) -> tuple[dict[Key, Reach], tuple[Hole, ...]]:
    """The rows that selection picks for some problem of the domain on some SM, and the problems that it cannot serve.

    A hole is told once, whatever its sizes, for the oldest SM that shows it; problems that are declared unsupported are
    no holes.
    """
    rows = tuple(entries)
    sides = {side for row in rows for side in (row.spec.head_dim, row.spec.head_dim + 8) if row.spec.head_dim}
    pairs = {(row.spec.head_dim, row.spec.head_dim_v) for row in rows if row.spec.head_dim != row.spec.head_dim_v}
    asked = _asked(tuple(sorted({*HEAD_DIMS, *sides})), tuple(sorted(pairs)))
    serving = _Serving(rows)
    reached: dict[Key, Reach] = {}
    holes: dict[tuple[object, ...], Hole] = {}
    for capability in _devices(rows, sms):
        here = _Here(rows, serving, capability)
        refused = {item for item in UNSUPPORTED if item.devices(capability)}
        for each in asked:
            if not refused.isdisjoint(each.unsupported):
                continue
            able = here.able(each)
            if able:
                here.reach(able, each, reached)
            elif each.first.facts not in holes:
                reason = _refusal(here.rows, each.first, capability)
                holes[each.first.facts] = Hole(each.first, capability.sm, reason)
    return reached, tuple(holes.values())


@dataclass(frozen=True)
class _Asked:
    """Problems that share all facts, and what no device changes of them.

    kind, shape: what rows are looked up by; families: those whose gates they pass; unsupported: what covers them.
    """

    problems: tuple[Problem, ...]
    kind: tuple[object, ...]
    shape: tuple[object, ...]
    families: tuple[Family, ...]
    unsupported: frozenset[Unsupported]

    @property
    def first(self) -> Problem:
        """One for all, where sizes do not matter."""
        return self.problems[0]


@lru_cache(maxsize=4)
def _asked(head_dims: tuple[int, ...], pairs: tuple[tuple[int, int], ...]) -> tuple[_Asked, ...]:
    """The domain with these head sizes, by facts, without what no kernel serves on any device (0.2 s)."""
    nowhere = {item for item in UNSUPPORTED if all(item.devices(Capability.of_sm(sm)) for sm in MODELS)}
    found = []
    for asked, sizes in questions(head_dims, pairs):
        for page_size in dict.fromkeys(size.page_size for size in sizes):
            size, *more = (size for size in sizes if size.page_size == page_size)
            first = size.problem(asked)
            covered = covering(first)
            if nowhere.isdisjoint(covered):
                problems = (first, *(size.problem(asked) for size in more))
                families = tuple(each for each in families_of(first.kernel_op) if problem_passes(each, first))
                shape = (first.mask, first.head_dim, first.head_dim_v)
                found.append(_Asked(problems, _kind(first), shape, families, covered))
    return tuple(found)


def _devices(rows: Sequence[Entry], sms: Iterable[int]) -> Iterator[Capability]:
    """The oldest SM of each kind of device that no row and no gate tells apart.

    Their numbers of SMs do not matter: they rank tiles of one family, head size and target against each other, of which
    flash_sm90 alone has several, and one kind of device loads those.
    """
    targets = {target for row in rows for target in row.code_targets}
    kinds: dict[tuple[object, ...], Capability] = {}
    for sm in sorted(sms):
        capability = Capability.of_sm(sm)
        loads = tuple(target for target in capability.targets if target in targets)
        kinds.setdefault((capability.features, capability.smem_optin_bytes, loads), capability)
    yield from kinds.values()


class _Serving:
    """The kernels that serve a problem's own axes on whatever device, looked for once for all that share them."""

    def __init__(self, rows: Iterable[Entry]) -> None:
        self._alike: dict[tuple[object, ...], list[InstanceSpec]] = defaultdict(list)
        self._found: dict[tuple[object, ...], list[InstanceSpec]] = {}
        for spec in dict.fromkeys(row.spec for row in rows):
            self._alike[_kind(spec)].append(spec)

    def specs(self, asked: _Asked) -> list[InstanceSpec]:
        """Those that nothing fixed when they were compiled keeps from the problem."""
        key = (*asked.kind, *asked.shape)  # all that problem_rejections look at
        if key not in self._found:
            self._found[key] = [
                spec for spec in self._alike[asked.kind] if not any(problem_rejections(spec, asked.first))
            ]
        return self._found[key]


class _Here:
    """What selection does on one device."""

    def __init__(self, rows: Iterable[Entry], serving: _Serving, capability: Capability) -> None:
        self.rows = [row for row in rows if capability.loads(row.code_targets)]
        self._serving = serving
        self._capability = capability
        self._running: dict[str, list[Entry]] = defaultdict(list)
        for row in self.rows:
            if not any(device_rejections(row, capability)):
                self._running[row.name].append(row)
        self._able: dict[tuple[object, ...], tuple[Entry, ...]] = {}
        self._alike: dict[tuple[int, ...], tuple[Entry, ...]] = {}  # head sizes that are padded to one have one tuple
        self._seen: set[tuple[object, ...]] = set()

    def able(self, asked: _Asked) -> tuple[Entry, ...]:
        """The rows that no gate rejects, as `selection.verdicts` has them, without the reasons."""
        key = (*asked.kind, *asked.shape, asked.families)
        if key not in self._able:
            dtype = DType(asked.first.dtype)
            families = {each for each in asked.families if device_passes(each, dtype, self._capability)}
            specs = (spec for spec in self._serving.specs(asked) if spec.family in families)
            rows = tuple(row for spec in specs for row in self._running.get(spec.name, ()))
            self._able[key] = self._alike.setdefault(tuple(map(id, rows)), rows)
        return self._able[key]

    def reach(self, able: tuple[Entry, ...], asked: _Asked, reached: dict[Key, Reach]) -> None:
        """Notes the row that runs, and the one that each other family would serve the problem with if asked for.

        Code of these kernels for other targets, which ranks behind them on this device, is at least shadowed.
        """
        for problem in asked.problems:
            sizes = (problem.batch, problem.tokens, problem.max_q, problem.max_k)
            key = (id(able), *sizes, problem.layout, problem.num_heads, problem.num_kv_heads)  # all that `cost` reads
            if key not in self._seen:
                self._seen.add(key)
                for place, row in enumerate(leaders(able, problem, self._capability).values()):
                    for twin in self._running[row.name]:
                        reached.setdefault((twin.name, twin.target), Reach.SHADOWED)
                    if reached[row.name, row.target] is not Reach.AUTO:
                        reached[row.name, row.target] = Reach.NAMED if place else Reach.AUTO


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
