"""Turns a kernel family's declared gates, a problem and a device into structured reasons why a row cannot serve it.

This is the only module that holds gates: selection, `explain`, errors and the coverage report all print these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

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
    if problem.page_size is not None:
        need = f"a multiple of {gates.page_multiple}"
        yield Check("page size", need, str(problem.page_size), problem.page_size % gates.page_multiple == 0)
    if problem.attn_mask is not TensorMask.NONE:
        need = "mask rows in multiples of 16 bytes" if gates.mask_aligned else "mask rows of any alignment"
        got = "16-byte aligned" if problem.mask_aligned else "unaligned"
        kind = TensorMask(problem.attn_mask)
        yield Check("mask tensor", _words(gates.tensor_masks - {TensorMask.NONE}), kind, kind in gates.tensor_masks)
        yield Check("mask alignment", need, got, problem.mask_aligned or not gates.mask_aligned)
    need = "pointers and strides in multiples of 16 bytes" if gates.aligned else "any alignment"
    got = "16-byte aligned" if problem.aligned else "unaligned"
    yield Check("alignment", need, got, problem.aligned or not gates.aligned)


def _heads(head_dim: int, head_dim_v: int) -> str:
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} (K) and {head_dim_v} (V)"


def family_rejections(family: Family, problem: Problem, capability: Capability) -> tuple[Rejection, ...]:
    """The gates that all rows of `family` share and that are not passed; the operator alone when that is another."""
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


@dataclass(frozen=True)
class Unsupported:
    """A part of the problem domain that is declared to have no kernel, and why; anything else unserved is a hole."""

    name: str
    covers: Callable[[Problem, Capability], bool]
    reason: str


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "dtype",
        lambda problem, _: problem.dtype not in (DType.FP16, DType.BF16),
        "kernels compute in fp16 or bf16; the reference serves the other types on the CPU",
    ),
    Unsupported(
        "quantised-cache",
        lambda problem, _: problem.kv_dtype is not problem.dtype,
        "kernels read K and V in the query's type; the reference serves quantised caches on the CPU",
    ),
    Unsupported(
        "before-sm53",
        lambda _, capability: Feature.HALF2 not in capability.features,
        "kernels begin at SM 5.3, where half-precision arithmetic does",
    ),
    Unsupported(
        "bf16-before-sm80",
        lambda problem, capability: (
            problem.kernel_op is KernelOp.ATTN
            and problem.dtype is DType.BF16
            and Feature.MMA_BF16 not in capability.features
        ),
        "attention in bf16 begins at SM 8.0, where the tensor cores' bf16 does",
    ),
    Unsupported(
        "merge-before-sm80",
        lambda problem, capability: (
            problem.kernel_op is KernelOp.MERGE_STATES and Feature.CP_ASYNC not in capability.features
        ),
        "merging states begins at SM 8.0, as the compiler of its template does",
    ),
    Unsupported(
        "sm-110",
        lambda _, capability: capability.sm // 10 == 11,
        "the kernel compiler still emits this part's former number, sm_101, which the build refuses",
    ),
    Unsupported(
        "large-heads",
        lambda problem, _: (
            problem.kernel_op is KernelOp.ATTN
            and max(problem.head_dim, problem.head_dim_v)
            > max(GATES[family].head_max for family in attention_families())
        ),
        "attention kernels take head sizes up to 512: of larger ones not 16 rows and 16 keys fit into 48 KiB",
    ),
    Unsupported(
        "unaligned",
        lambda problem, _: problem.kernel_op is KernelOp.ATTN and not problem.aligned,
        "attention kernels load 16 bytes at a time",
    ),
)


def unsupported(problem: Problem, capability: Capability) -> Unsupported | None:
    """The declared reason that no kernel serves `problem` on `capability`; None where one must."""
    return next((item for item in UNSUPPORTED if item.covers(problem, capability)), None)
