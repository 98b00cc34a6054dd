"""Turns a call into a verdict on the family flash_sm90: right, alone, and its tickets put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import pa_ops
from helpers.chosen import problem_of
from helpers.parity import Evidence, check, expected
from helpers.problems import Call, paged, varlen
from pa_ops import scratch
from pa_ops.manifest import Entry
from pa_ops.registry import current_capability

FAMILY = "flash_sm90"
HEAD_DIMS = (64, 128, 192, 256)
MASKS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"sliding_window": 37},
}
MIXED = [(70, 200), (1, 130), (0, 40), (3, 3), (193, 1025), (129, 129), (5, 2)]
OPERATORS = {"paged": paged, "dense": varlen}


def tickets() -> list[int]:
    """Tiles that were taken, and warps that have arrived with a part of one, in every stream's workspace."""
    place = scratch.tiles_at(current_capability().num_sms) // 4
    return [int(word) for room in scratch.held.values() for word in room[place:].tolist()]


def instances_of(call: Call) -> list[Entry]:
    """The kernels of the family for calls like this, by the lengths of sequences; first the one for short ones."""
    chosen = pa_ops.select(problem_of(call), backend=FAMILY)
    able = [verdict.entry for verdict in chosen.reasons if verdict.eligible]
    return [chosen.entry, *(e for e in able if e.spec.head_dim == chosen.entry.spec.head_dim and e != chosen.entry)]


def on_sm90(call: Call, evidence: Evidence, what: object = "") -> tuple[Tensor, Tensor]:
    """Checks a call that the family must serve alone, by each of its kernels, and that it puts its tickets back."""
    want = expected(call)
    found = [checked(call, entry.name, evidence, what, want) for entry in instances_of(call)]
    return found[0]


def checked(
    call: Call, instance: str, evidence: Evidence, what: object, want: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Checks a call by one kernel of the family."""
    with pa_ops.trace.recording() as calls:
        found = check(call.with_options(backend=instance), evidence, what, want)
    assert [made.instance for made in calls] == [instance]
    assert not any(tickets()), f"{what}: tickets and arrivals must end as they began"
    return found
