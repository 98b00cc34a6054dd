"""Turns a family's gates, a row, a problem and a device into structured reasons why the row cannot serve the problem.

Nobody but the overrides (`selection.Policy`) makes others: selection, `explain`, errors and the coverage report all
print these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

from pa_ops.capability import Capability, min_sm
from pa_ops.gates import GATES, NOTHING, Gates
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.spec import DType, Family, InstanceSpec, Mask, TensorMask


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


@cache
def _words(values: frozenset[str]) -> str:
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
    passed: Callable[[Gates, Problem], bool]
    need: Callable[[Gates, Problem], str]
    got: Callable[[Problem], str]
    asked: Callable[[Gates, Problem], bool] = lambda gates, problem: True


def _option(name: str) -> _Gate:
    return _Gate(
        name,
        lambda gates, problem: getattr(gates, name) or not getattr(problem, name),
        lambda gates, _: "on or off" if getattr(gates, name) else "off",
        lambda problem: "on" if getattr(problem, name) else "off",
    )


def _served(gates: Gates) -> frozenset[Mask]:
    return frozenset(mask for masks in gates.masks.values() for mask in masks)


def _head_sizes(problem: Problem) -> str:
    return _heads(problem.head_dim, problem.head_dim_v)


_FAMILY_GATES = (
    _Gate(
        "operator",
        lambda gates, problem: problem.kernel_op is gates.op,
        lambda gates, _: str(gates.op),
        lambda problem: f"{problem.kernel_op} ({problem.op})",
    ),
    _Gate(
        "dtype",
        lambda gates, problem: problem.dtype in gates.needs,
        lambda gates, _: _words(frozenset(gates.needs)),
        lambda problem: str(problem.dtype),
    ),
    _Gate(
        "cache dtype",
        lambda gates, problem: gates.quantised or problem.kv_dtype == problem.dtype,
        lambda gates, problem: "any stored type" if gates.quantised else f"the query's type {problem.dtype}",
        lambda problem: str(problem.kv_dtype),
    ),
    _Gate(
        "head size",
        lambda gates, problem: all(
            head % gates.head_multiple == 0 and head <= gates.head_max
            for head in (problem.head_dim, problem.head_dim_v)
        ),
        lambda gates, _: f"a multiple of {gates.head_multiple} up to {gates.head_max}",
        _head_sizes,
    ),
    _Gate(
        "equal head sizes",
        lambda gates, problem: gates.split_heads or problem.head_dim == problem.head_dim_v,
        lambda gates, _: "one head size for K and V",
        _head_sizes,
        lambda gates, _: not gates.split_heads,
    ),
    _Gate(
        "layout",
        lambda gates, problem: problem.layout in gates.layouts,
        lambda gates, _: _words(gates.layouts),
        lambda problem: str(problem.layout),
    ),
    _Gate(
        "mask",
        lambda gates, problem: any(problem.mask in masks for masks in gates.masks.values()),
        lambda gates, _: _words(_served(gates)),
        lambda problem: str(problem.mask),
    ),
    _option("softcap"),
    _option("sinks"),
    _Gate(
        "page size",
        lambda gates, problem: problem.page_size is None or problem.page_size % gates.page_multiple == 0,
        lambda gates, _: f"a multiple of {gates.page_multiple}",
        lambda problem: str(problem.page_size),
        lambda gates, problem: problem.page_size is not None,
    ),
    _Gate(
        "mask tensor",
        lambda gates, problem: problem.attn_mask in gates.tensor_masks,
        lambda gates, _: _words(gates.tensor_masks - {TensorMask.NONE}),
        lambda problem: str(problem.attn_mask),
        lambda gates, problem: problem.attn_mask is not TensorMask.NONE,
    ),
    _Gate(
        "mask alignment",
        lambda gates, problem: problem.attn_mask is TensorMask.NONE or problem.mask_aligned or not gates.mask_aligned,
        lambda gates, _: "mask rows in multiples of 16 bytes" if gates.mask_aligned else "mask rows of any alignment",
        lambda problem: "16-byte aligned" if problem.mask_aligned else "unaligned",
        lambda gates, problem: problem.attn_mask is not TensorMask.NONE,
    ),
    _Gate(
        "alignment",
        lambda gates, problem: problem.aligned or not gates.aligned,
        lambda gates, _: "pointers and strides in multiples of 16 bytes" if gates.aligned else "any alignment",
        lambda problem: "16-byte aligned" if problem.aligned else "unaligned",
    ),
)


def family_checks(family: Family, problem: Problem, capability: Capability) -> Iterator[Check]:
    """Every gate that all rows of `family` share, beside the actual value; the device's comes last."""
    gates = GATES[family]
    for gate in _FAMILY_GATES:
        if gate.asked(gates, problem):
            yield Check(gate.name, gate.need(gates, problem), gate.got(problem), gate.passed(gates, problem))
    dtype = DType(problem.dtype)
    need, got = _device_need(gates, dtype), f"sm {capability.sm}"
    yield Check("device", need, got, device_passes(family, dtype, capability))


def problem_passes(family: Family, problem: Problem) -> bool:
    """Whether some device's rows of `family` may serve the problem: every gate that they share but the device's."""
    gates = GATES[family]
    return all(gate.passed(gates, problem) for gate in _FAMILY_GATES)


def device_passes(family: Family, dtype: DType, capability: Capability) -> bool:
    """Whether the device has all features that the family's code for `dtype` uses."""
    return GATES[family].needs.get(dtype, NOTHING) <= capability.features


def _heads(head_dim: int, head_dim_v: int) -> str:
    return str(head_dim) if head_dim == head_dim_v else f"{head_dim} (K) and {head_dim_v} (V)"


def family_rejections(family: Family, problem: Problem, capability: Capability) -> tuple[Rejection, ...]:
    """The gates that all rows of `family` share and that are not passed; the operator alone when that is another."""
    if problem_passes(family, problem) and device_passes(family, DType(problem.dtype), capability):
        return ()
    failed = (check.rejection() for check in family_checks(family, problem, capability) if not check.passed)
    return tuple(failed if GATES[family].op is problem.kernel_op else islice(failed, 1))


def device_rejections(entry: Entry, capability: Capability) -> Iterator[Rejection]:
    """Why a device cannot run a row, whatever the problem: it does not load the code, or lacks shared memory."""
    if not capability.loads(entry.code_targets):
        yield Rejection("code target", f"code that sm {capability.sm} loads", ", ".join(entry.code_targets))
    if entry.smem_bytes > capability.smem_optin_bytes:
        need = f"{entry.smem_bytes} B of shared memory a block"
        yield Rejection("shared memory", need, f"{capability.smem_optin_bytes} B")


def problem_rejections(spec: InstanceSpec, problem: Problem) -> Iterator[Rejection]:
    """Why a row of the problem's operator cannot serve it on any device: what was fixed when it was compiled."""
    if spec.dtype is not problem.dtype:
        yield Rejection("row dtype", str(spec.dtype), str(problem.dtype))
    if spec.kv_dtype is not problem.kv_dtype:
        yield Rejection("row cache dtype", str(spec.kv_dtype), str(problem.kv_dtype))
    if spec.layout is not problem.layout:
        yield Rejection("row layout", str(spec.layout), str(problem.layout))
    served = GATES[spec.family].masks[spec.mask]
    if problem.mask not in served:
        yield Rejection("row mask", _words(served), str(problem.mask))
    if 0 < spec.head_dim < problem.head_dim or 0 < spec.head_dim_v < problem.head_dim_v:
        need = f"at most {_heads(spec.head_dim, spec.head_dim_v)}"
        yield Rejection("row head size", need, _heads(problem.head_dim, problem.head_dim_v))
