"""Turns a kernel family's declared gates, a problem and a device into structured reasons why a row cannot serve it.

This is the only module that holds gates: selection, `explain`, errors and the coverage report all print these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pa_ops.capability import Capability, Feature, min_sm
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.spec import DType, Family, InstanceSpec, KernelOp, Layout, Mask


@dataclass(frozen=True)
class Gates:
    """What every row of a family asks for.

    needs: features by dtype of the query. masks: which masks of a problem a row of each mask serves. head_multiple and
    head_max bind both head sizes. split_heads: K and V may differ in head size. aligned: pointers and strides must be
    multiples of 16 bytes. quantised: the cache may have another type than the query.
    """

    op: KernelOp
    needs: Mapping[DType, frozenset[Feature]]
    layouts: frozenset[Layout]
    masks: Mapping[Mask, frozenset[Mask]]
    head_multiple: int
    head_max: int
    split_heads: bool
    softcap: bool
    sinks: bool
    aligned: bool
    quantised: bool


_OWN_MASK = {mask: frozenset({mask}) for mask in Mask}
_ANY_MASK = {mask: frozenset(Mask) for mask in Mask}

GATES: dict[Family, Gates] = {
    Family.FLASH_SM80: Gates(
        op=KernelOp.ATTN,
        needs={
            DType.FP16: frozenset({Feature.CP_ASYNC, Feature.MMA_F16}),
            DType.BF16: frozenset({Feature.CP_ASYNC, Feature.MMA_BF16}),
        },
        layouts=frozenset(Layout),
        masks=_OWN_MASK,
        head_multiple=8,
        head_max=256,
        split_heads=True,
        softcap=True,
        sinks=True,
        aligned=True,
        quantised=False,
    ),
    Family.APPEND: Gates(
        op=KernelOp.APPEND_KV,
        needs={DType.FP16: frozenset(), DType.BF16: frozenset()},
        layouts=frozenset({Layout.GATHER}),
        masks=_ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        softcap=True,
        sinks=True,
        aligned=False,
        quantised=False,
    ),
    Family.MERGE: Gates(
        op=KernelOp.MERGE_STATES,
        needs={DType.FP16: frozenset(), DType.BF16: frozenset()},
        layouts=frozenset({Layout.DENSE}),
        masks=_ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        softcap=True,
        sinks=True,
        aligned=False,
        quantised=False,
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


def _device_need(gates: Gates, dtype: DType) -> tuple[str, bool, frozenset[Feature]]:
    """The text of the device gate for `dtype`; for a dtype that is not served, of every dtype that is."""
    served = {dtype: gates.needs[dtype]} if dtype in gates.needs else dict(gates.needs)
    texts = []
    for name, features in served.items():
        oldest = min_sm(features)
        labels = ", ".join(sorted(feature.label for feature in features)) or "no special feature"
        texts.append(f"sm >= {oldest} for {name} ({labels})")
    return "; ".join(texts), dtype in gates.needs, gates.needs.get(dtype, frozenset())


def family_checks(family: Family, problem: Problem, capability: Capability) -> Iterator[Check]:
    """Every gate that all rows of `family` share, beside the actual value."""
    gates = GATES[family]
    dtype, kv_dtype = DType(problem.dtype), DType(problem.kv_dtype)
    yield Check("operator", f"{gates.op}", f"{problem.kernel_op} ({problem.op})", problem.kernel_op is gates.op)
    yield Check("dtype", _words(gates.needs), str(dtype), dtype in gates.needs)
    need, known, features = _device_need(gates, dtype)
    yield Check("device", need, f"sm {capability.sm}", not known or features <= capability.features)
    need = "any stored type" if gates.quantised else f"the query's type {dtype}"
    yield Check("cache dtype", need, str(kv_dtype), gates.quantised or kv_dtype == dtype)
    heads = (problem.head_dim, problem.head_dim_v)
    fits = all(head % gates.head_multiple == 0 and head <= gates.head_max for head in heads)
    need = f"a multiple of {gates.head_multiple} up to {gates.head_max}"
    yield Check("head size", need, _heads(*heads), fits)
    if not gates.split_heads:
        yield Check("equal head sizes", "one head size for K and V", _heads(*heads), len(set(heads)) == 1)
    yield Check("layout", _words(gates.layouts), str(problem.layout), problem.layout in gates.layouts)
    served = {mask for masks in gates.masks.values() for mask in masks}
    yield Check("mask", _words(served), str(problem.mask), problem.mask in served)
    for option, supported in (("softcap", gates.softcap), ("sinks", gates.sinks)):
        asked = bool(getattr(problem, option))
        yield Check(option, "on or off" if supported else "off", "on" if asked else "off", supported or not asked)
    need = "pointers and strides in multiples of 16 bytes" if gates.aligned else "any alignment"
    got = "16-byte aligned" if problem.aligned else "unaligned"
    yield Check("alignment", need, got, problem.aligned or not gates.aligned)


def _heads(head_dim: int, head_dim_v: int) -> str:
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} (K) and {head_dim_v} (V)"


def row_checks(entry: Entry, problem: Problem, capability: Capability) -> Iterator[Check]:
    """Every gate of one row's own: what was fixed when it was compiled, and for which device."""
    spec = entry.spec
    loads = any(target in capability.targets for target in entry.code_targets)
    yield Check("code target", f"code that sm {capability.sm} loads", ", ".join(entry.code_targets), loads)
    fits = entry.smem_bytes <= capability.smem_optin_bytes
    need = f"{entry.smem_bytes} B of shared memory a block"
    yield Check("shared memory", need, f"{capability.smem_optin_bytes} B", fits)
    yield Check("row dtype", str(spec.dtype), str(problem.dtype), spec.dtype == problem.dtype)
    yield Check("row cache dtype", str(spec.kv_dtype), str(problem.kv_dtype), spec.kv_dtype == problem.kv_dtype)
    yield Check("row layout", str(spec.layout), str(problem.layout), spec.layout == problem.layout)
    served = GATES[spec.family].masks[spec.mask]
    yield Check("row mask", _words(served), str(problem.mask), problem.mask in served)
    pairs = ((spec.head_dim, problem.head_dim), (spec.head_dim_v, problem.head_dim_v))
    fits = all(limit == 0 or head <= limit for limit, head in pairs)
    need = f"at most {_heads(spec.head_dim, spec.head_dim_v)}" if any(limit for limit, _ in pairs) else "any"
    yield Check("row head size", need, _heads(problem.head_dim, problem.head_dim_v), fits)


def rejections(entry: Entry, problem: Problem, capability: Capability) -> Iterator[Rejection]:
    """Why `entry` cannot serve `problem` on `capability`; nothing when it can. Sizes never appear."""
    for check in (
        *family_checks(entry.spec.family, problem, capability),
        *row_checks(entry, problem, capability),
    ):
        if not check.passed:
            yield check.rejection()
