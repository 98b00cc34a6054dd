"""Turns a call into a verdict on the family flash_sm90: right, alone, and its tickets put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import pa_ops
from helpers.parity import Evidence, check
from helpers.problems import Call, paged, varlen
from pa_ops import scratch
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
    """The count of tickets in every stream's workspace."""
    place = scratch.tickets_at(current_capability().num_sms) // 4
    return [int(room[place]) for room in scratch.held.values()]


def on_sm90(call: Call, evidence: Evidence, what: object = "") -> tuple[Tensor, Tensor]:
    """Checks a call that the family must serve alone, and that it puts its tickets back."""
    with pa_ops.trace.recording() as calls:
        found = check(call.with_options(backend=FAMILY), evidence, what)
    assert [made.family for made in calls] == [FAMILY]
    assert not any(tickets()), f"{what}: tickets must end as they began"
    return found
