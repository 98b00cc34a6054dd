"""Turns a problem that no kernel is made for into the declared reason; what is unserved without one is a hole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pa_ops.capability import Capability, Feature
from pa_ops.families import GATES, attention_families
from pa_ops.problem import Problem
from pa_ops.spec import DType, KernelOp


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
