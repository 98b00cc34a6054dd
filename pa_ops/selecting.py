"""Turns a question about a problem and a device, present or not, into the answer that a call there would get."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument
from pa_ops.gates import attention_families
from pa_ops.jit import declared_entries
from pa_ops.overrides import policy
from pa_ops.problem import Problem
from pa_ops.registry import capability_of, current_capability, for_capability
from pa_ops.selection import AUTO, Selection, explain_text, select_entry

if TYPE_CHECKING:
    import torch

Device: TypeAlias = "Capability | torch.device | str | int"


def select(problem: Problem, device: Device | None = None, backend: str = AUTO) -> Selection:
    """The kernel that would serve `problem` on `device`, under the overrides in force.

    Where two kernels share the sequences of a paged batch (`pa_ops.heuristics.division`), it is the one for sequences
    as long as the bound or the mean; `pa_ops.trace` records every launch of a call.

    device: a Capability, an SM number such as 90, a torch device or its name ("cuda:1"); None is the current GPU, or
    PA_OPS_SM's. Where nothing has been built for the device, the kernels that a build would make answer. Raises
    NoInstance with every family's gates, InvalidArgument for a device that means nothing.
    """
    capability = capability_for(device)
    entries = for_capability(capability).entries
    if entries:
        return for_capability(capability).select(problem, backend)
    return select_entry(declared_entries(capability), problem, capability, policy(backend))


def explain(problem: Problem, device: Device | None = None, backend: str = AUTO) -> str:
    """The decision that `select` would take, as text: what it looked at, and each row with what rejects it."""
    capability = capability_for(device)
    entries = for_capability(capability).entries or declared_entries(capability)
    return explain_text(entries, problem, capability, policy(backend))


def families() -> tuple[str, ...]:
    """The families that answer attention, as `backend=` takes them."""
    return tuple(str(family) for family in attention_families())


def capability_for(device: Device | None) -> Capability:
    """The device that a caller means; raises InvalidArgument."""
    if device is None:
        return current_capability()
    if isinstance(device, Capability):
        return device
    if isinstance(device, int):
        return Capability.of_sm(device)
    import torch  # where a device is named by torch's words; an SM number answers without it

    named = torch.device(device)
    if named.type != "cuda":
        raise InvalidArgument("device", "must be a CUDA device, a Capability or an SM number", repr(str(named)))
    return capability_of(torch.cuda.current_device() if named.index is None else named.index)
