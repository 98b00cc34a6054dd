"""Turns a kernel family's declared gates, a problem and a device into structured reasons why a row cannot serve it.

This is the only module that holds gates: selection, `explain`, errors and the coverage report all print these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from pa_ops.capability import Capability, Feature, min_sm
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.spec import DType, Family, InstanceSpec, KernelOp, Layout, Mask, TensorMask


@dataclass(frozen=True)
class Gates:
    """What every row of a family asks for.

    needs: features by dtype of the query. masks: which masks of a problem a row of each mask serves. head_multiple and
    head_max bind both head sizes. split_heads: K and V may differ in head size. aligned: pointers and strides must be
    multiples of 16 bytes. quantised: the cache may have another type than the query. invariant: what a row makes of a
    sequence depends on nothing else in the batch. page_multiple: of which the tokens of a page must be a multiple.
    mask_aligned: the rows of a mask tensor must start and end at multiples of 16 bytes. tensor_masks: what it may hold.
    """

    op: KernelOp
    needs: Mapping[DType, frozenset[Feature]]
    layouts: frozenset[Layout]
    masks: Mapping[Mask, frozenset[Mask]]
    head_multiple: int = 8
    head_max: int = 256
    split_heads: bool = False
    softcap: bool = True
    sinks: bool = True
    aligned: bool = True
    quantised: bool = False
    invariant: bool = True
    page_multiple: int = 1
    mask_aligned: bool = False
    tensor_masks: frozenset[TensorMask] = frozenset(TensorMask)


_OWN_MASK = {mask: frozenset({mask}) for mask in Mask}
_FULL_BY_FLAG = {
    Mask.FULL: frozenset(),
    Mask.CAUSAL: frozenset({Mask.CAUSAL, Mask.FULL}),
    Mask.WINDOW: frozenset({Mask.WINDOW}),
}
_ANY_MASK = {mask: frozenset(Mask) for mask in Mask}
_ANY_LAYOUT = frozenset(Layout)
_PAGED = frozenset({Layout.GATHER})
_NOTHING: frozenset[Feature] = frozenset()


def _both(*features: Feature) -> dict[DType, frozenset[Feature]]:
    """The same features for both dtypes."""
    return {dtype: frozenset(features) for dtype in (DType.FP16, DType.BF16)}


_MMA_SYNC = {
    DType.FP16: frozenset({Feature.CP_ASYNC, Feature.MMA_F16}),
    DType.BF16: frozenset({Feature.CP_ASYNC, Feature.MMA_BF16}),
}
_MEA = {DType.FP16: frozenset({Feature.HALF2}), DType.BF16: frozenset({Feature.MMA_BF16})}

GATES: dict[Family, Gates] = {
    Family.FLASH_SM80: Gates(KernelOp.ATTN, _MMA_SYNC, _ANY_LAYOUT, _OWN_MASK, mask_aligned=True),
    Family.FLASH_SM90: Gates(
        KernelOp.ATTN,
        _both(Feature.TMA, Feature.WGMMA),
        _ANY_LAYOUT,
        _OWN_MASK,
        page_multiple=8,
        mask_aligned=True,
        tensor_masks=frozenset({TensorMask.NONE, TensorMask.BOOL, TensorMask.ADDITIVE}),
    ),
    Family.DECODE: Gates(KernelOp.ATTN, _MMA_SYNC, _PAGED, _FULL_BY_FLAG, invariant=False),
    Family.MEA: Gates(KernelOp.ATTN, _MEA, _ANY_LAYOUT, _OWN_MASK, head_max=512, split_heads=True),
    Family.MEA_DECODE: Gates(KernelOp.ATTN, _MEA, _PAGED, _FULL_BY_FLAG, invariant=False),
    Family.APPEND: Gates(
        KernelOp.APPEND_KV,
        _both(Feature.HALF2),
        _PAGED,
        _ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        aligned=False,
    ),
    Family.GATHER: Gates(
        KernelOp.GATHER_KV,
        _both(Feature.HALF2),
        _PAGED,
        _ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        aligned=False,
    ),
    Family.MERGE: Gates(
        KernelOp.MERGE_STATES,
        _both(Feature.CP_ASYNC),
        frozenset({Layout.DENSE}),
        _ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        aligned=False,
    ),
}


@dataclass(frozen=True)
class Rejection:
    """One gate that a problem or a device does not pass: its name, what it needs, what it got."""

    gate: str
    need: str
    got: str

    def __str__(self) -> str:
        return f"{self.gate}: needs {self.need}, got {self.got}"


@dataclass(frozen=True)
class Check(Rejection):
    """One gate beside the actual value, passed or not."""

    passed: bool

    def rejection(self) -> Rejection:
        """The same without the verdict."""
        return Rejection(self.gate, self.need, self.got)


def attention_families() -> tuple[Family, ...]:
    """Families that answer attention problems."""
    return tuple(family for family, gates in GATES.items() if gates.op is KernelOp.ATTN)


def families_of(op: KernelOp) -> tuple[Family, ...]:
    """Families that compute `op`."""
    return tuple(family for family, gates in GATES.items() if gates.op is op)


def needs(spec: InstanceSpec) -> frozenset[Feature]:
    """Features that a kernel's code uses; empty where its dtype is not one that the family declares."""
    return GATES[spec.family].needs.get(spec.dtype, frozenset())


def _words(values: Iterable[str]) -> str:
    return " or ".join(sorted(str(value) for value in values))


def _device_need(gates: Gates, dtype: DType) -> str:
    """The text of the device gate for `dtype`; for a dtype that is not served, of every dtype that is."""
    served = {dtype: gates.needs[dtype]} if dtype in gates.needs else dict(gates.needs)
    texts = []
    for name, features in served.items():
        oldest = min_sm(features)
        labels = ", ".join(sorted(feature.label for feature in features)) or "no special feature"
        texts.append(f"sm >= {oldest} for {name} ({labels})")
    return "; ".join(texts)


class _Gate(NamedTuple):
    """One thing that all rows of a family ask for: whether it is passed, and in words what is needed and what is there.

    The words cost far more than the verdict, so that a survey of all problems asks for the verdict alone.
    """

    name: str
    passed: Callable[[Gates, Problem, Capability], bool]
    need: Callable[[Gates, Problem], str]
    got: Callable[[Problem, Capability], str]
    asked: Callable[[Gates, Problem], bool] = lambda gates, problem: True


def _option(name: str) -> _Gate:
    return _Gate(
        name,
        lambda gates, problem, _: getattr(gates, name) or not getattr(problem, name),
        lambda gates, _: "on or off" if getattr(gates, name) else "off",
        lambda problem, _: "on" if getattr(problem, name) else "off",
    )


def _served(gates: Gates) -> set[Mask]:
    return {mask for masks in gates.masks.values() for mask in masks}


def _head_sizes(problem: Problem, _: Capability) -> str:
    return _heads(problem.head_dim, problem.head_dim_v)


_FAMILY_GATES = (
    _Gate(
        "operator",
        lambda gates, problem, _: problem.kernel_op is gates.op,
        lambda gates, _: str(gates.op),
        lambda problem, _: f"{problem.kernel_op} ({problem.op})",
    ),
    _Gate(
        "dtype",
        lambda gates, problem, _: problem.dtype in gates.needs,
        lambda gates, _: _words(gates.needs),
        lambda problem, _: str(problem.dtype),
    ),
    _Gate(
        "device",
        lambda gates, problem, capability: gates.needs.get(DType(problem.dtype), _NOTHING) <= capability.features,
        lambda gates, problem: _device_need(gates, DType(problem.dtype)),
        lambda _, capability: f"sm {capability.sm}",
    ),
    _Gate(
        "cache dtype",
        lambda gates, problem, _: gates.quantised or problem.kv_dtype == problem.dtype,
        lambda gates, problem: "any stored type" if gates.quantised else f"the query's type {problem.dtype}",
        lambda problem, _: str(problem.kv_dtype),
    ),
    _Gate(
        "head size",
        lambda gates, problem, _: all(
            head % gates.head_multiple == 0 and head <= gates.head_max
            for head in (problem.head_dim, problem.head_dim_v)
        ),
        lambda gates, _: f"a multiple of {gates.head_multiple} up to {gates.head_max}",
        _head_sizes,
    ),
    _Gate(
        "equal head sizes",
        lambda gates, problem, _: gates.split_heads or problem.head_dim == problem.head_dim_v,
        lambda gates, _: "one head size for K and V",
        _head_sizes,
        lambda gates, _: not gates.split_heads,
    ),
    _Gate(
        "layout",
        lambda gates, problem, _: problem.layout in gates.layouts,
        lambda gates, _: _words(gates.layouts),
        lambda problem, _: str(problem.layout),
    ),
    _Gate(
        "mask",
        lambda gates, problem, _: any(problem.mask in masks for masks in gates.masks.values()),
        lambda gates, _: _words(_served(gates)),
        lambda problem, _: str(problem.mask),
    ),
    _option("softcap"),
    _option("sinks"),
    _Gate(
        "page size",
        lambda gates, problem, _: problem.page_size is None or problem.page_size % gates.page_multiple == 0,
        lambda gates, _: f"a multiple of {gates.page_multiple}",
        lambda problem, _: str(problem.page_size),
        lambda gates, problem: problem.page_size is not None,
    ),
    _Gate(
        "mask tensor",
        lambda gates, problem, _: problem.attn_mask in gates.tensor_masks,
        lambda gates, _: _words(gates.tensor_masks - {TensorMask.NONE}),
        lambda problem, _: str(problem.attn_mask),
        lambda gates, problem: problem.attn_mask is not TensorMask.NONE,
    ),
    _Gate(
        "mask alignment",
        lambda gates, problem, _: (
            problem.attn_mask is TensorMask.NONE or problem.mask_aligned or not gates.mask_aligned
        ),
        lambda gates, _: "mask rows in multiples of 16 bytes" if gates.mask_aligned else "mask rows of any alignment",
        lambda problem, _: "16-byte aligned" if problem.mask_aligned else "unaligned",
        lambda gates, problem: problem.attn_mask is not TensorMask.NONE,
    ),
    _Gate(
        "alignment",
        lambda gates, problem, _: problem.aligned or not gates.aligned,
        lambda gates, _: "pointers and strides in multiples of 16 bytes" if gates.aligned else "any alignment",
        lambda problem, _: "16-byte aligned" if problem.aligned else "unaligned",
    ),
)


def family_checks(family: Family, problem: Problem, capability: Capability) -> Iterator[Check]:
    """Every gate that all rows of `family` share, beside the actual value."""
    gates = GATES[family]
    for gate in _FAMILY_GATES:
        if gate.asked(gates, problem):
            passed = gate.passed(gates, problem, capability)
            yield Check(gate.name, gate.need(gates, problem), gate.got(problem, capability), passed)


def family_passes(family: Family, problem: Problem, capability: Capability) -> bool:
    """Whether no gate that all rows of `family` share rejects the problem."""
    gates = GATES[family]
    return all(gate.passed(gates, problem, capability) for gate in _FAMILY_GATES)


def _heads(head_dim: int, head_dim_v: int) -> str:
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} (K) and {head_dim_v} (V)"


def family_rejections(family: Family, problem: Problem, capability: Capability) -> tuple[Rejection, ...]:
    """The gates that all rows of `family` share and that are not passed; the operator alone when that is another."""
    if family_passes(family, problem, capability):
        return ()
    failed = (check.rejection() for check in family_checks(family, problem, capability) if not check.passed)
    return tuple(failed if GATES[family].op is problem.kernel_op else islice(failed, 1))


def row_rejections(entry: Entry, problem: Problem, capability: Capability) -> Iterator[Rejection]:
    """The gates of one row's own that are not passed: what was fixed when it was compiled, and for which device."""
    spec = entry.spec
    if spec.op is not problem.kernel_op:
        return
    if not any(target in capability.targets for target in entry.code_targets):
        yield Rejection("code target", f"code that sm {capability.sm} loads", ", ".join(entry.code_targets))
    if entry.smem_bytes > capability.smem_optin_bytes:
        need = f"{entry.smem_bytes} B of shared memory a block"
        yield Rejection("shared memory", need, f"{capability.smem_optin_bytes} B")
    if spec.dtype is not problem.dtype:
        yield Rejection("row dtype", str(spec.dtype), str(problem.dtype))
    if spec.kv_dtype is not problem.kv_dtype:
        yield Rejection("row cache dtype", str(spec.kv_dtype), str(problem.kv_dtype))
    if spec.layout is not problem.layout:
        yield Rejection("row layout", str(spec.layout), str(problem.layout))
    served = GATES[spec.family].masks[spec.mask]
    if problem.mask not in served:
        yield Rejection("row mask", _words(served), str(problem.mask))
    pairs = ((spec.head_dim, problem.head_dim), (spec.head_dim_v, problem.head_dim_v))
    if any(limit and head > limit for limit, head in pairs):
        need = f"at most {_heads(spec.head_dim, spec.head_dim_v)}"
        yield Rejection("row head size", need, _heads(problem.head_dim, problem.head_dim_v))


def rejections(entry: Entry, problem: Problem, capability: Capability) -> Iterator[Rejection]:
    """Why `entry` cannot serve `problem` on `capability`; nothing when it can. Sizes never appear."""
    yield from family_rejections(entry.spec.family, problem, capability)
    yield from row_rejections(entry, problem, capability)
