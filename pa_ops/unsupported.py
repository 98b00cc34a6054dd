"""Turns a problem that no kernel is made for into the declared reason; what is unserved without one is a hole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pa_ops.capability import Capability, Feature
from pa_ops.gates import GATES, attention_families
from pa_ops.problem import Problem
from pa_ops.spec import DType, KernelOp

HEAD_MAX = max(GATES[family].head_max for family in attention_families())


def _every(_: object) -> bool:
    return True


@dataclass(frozen=True)
class Unsupported:
    """A part of the problem domain that is declared to have no kernel, and why; anything else unserved is a hole.

    It covers those problems (all where it names none) on those devices (likewise).
    """

    name: str
    reason: str
    problems: Callable[[Problem], bool] = _every
    devices: Callable[[Capability], bool] = _every


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "dtype",
        "kernels compute in fp16 or bf16; the reference serves the other types on the CPU",
        lambda problem: problem.dtype not in (DType.FP16, DType.BF16),
    ),
    Unsupported(
        "quantised-cache",
        "kernels read K and V in the query's type; the reference serves quantised caches on the CPU",
        lambda problem: problem.kv_dtype is not problem.dtype,
    ),
    Unsupported(
        "before-sm53",
        "kernels begin at SM 5.3, where half-precision arithmetic does",
        devices=lambda capability: Feature.HALF2 not in capability.features,
    ),
    Unsupported(
        "bf16-before-sm80",
        "attention in bf16 begins at SM 8.0, where the tensor cores' bf16 does",
        lambda problem: problem.kernel_op is KernelOp.ATTN and problem.dtype is DType.BF16,
        lambda capability: Feature.MMA_BF16 not in capability.features,
    ),
    Unsupported(
        "merge-before-sm80",
        "merging states begins at SM 8.0, as the compiler of its template does",
        lambda problem: problem.kernel_op is KernelOp.MERGE_STATES,
        lambda capability: Feature.CP_ASYNC not in capability.features,
    ),
    Unsupported(
        "sm-110",
        "the kernel compiler still emits this part's former number, sm_101, which the build refuses",
        devices=lambda capability: capability.sm // 10 == 11,
    ),
    Unsupported(
        "large-heads",
        "attention kernels take head sizes up to 512: of larger ones not 16 rows and 16 keys fit into 48 KiB",
        lambda problem: problem.kernel_op is KernelOp.ATTN and max(problem.head_dim, problem.head_dim_v) > HEAD_MAX,
    ),
    Unsupported(
        "unaligned",
        "attention kernels load 16 bytes at a time",
        lambda problem: problem.kernel_op is KernelOp.ATTN and not problem.aligned,
    ),
)


def covering(problem: Problem) -> frozenset[Unsupported]:
    """The declared reasons that cover `problem` on some device."""
    return frozenset(item for item in UNSUPPORTED if item.problems(problem))


def unsupported(problem: Problem, capability: Capability) -> Unsupported | None:
    """The first declared reason that no kernel serves `problem` on `capability`; None where one must."""
    return next((item for item in UNSUPPORTED if item.problems(problem) and item.devices(capability)), None)
