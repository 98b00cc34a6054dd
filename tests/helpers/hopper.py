"""Turns a call into a verdict on the family flash_sm90: right, alone, and its tickets put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import pa_ops
from helpers.chosen import problem_of
from helpers.parity import Evidence, check, error_of, expected
from helpers.problems import Call, paged, prefix_sums, varlen
from helpers.rooms import poison
from helpers.streams import side_by_side
from pa_ops import scratch
from pa_ops.manifest import Entry
from pa_ops.registry import current_capability

FAMILY = "flash_sm90"
SIZES = {str(head_dim): {"head_dim": head_dim} for head_dim in (64, 96, 128, 192, 256)}
SIZES["192-128"] = {"head_dim": 192, "head_dim_v": 128}
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


def same_on_streams(calls: Sequence[Call]) -> None:
    """Checks that calls beside each other give the bits that they give alone, and put their tickets back."""
    wanted = [call.run()[0] for call in calls]
    for results in side_by_side(calls):
        for call, (got, _), want in zip(calls, results, wanted, strict=True):
            assert torch.equal(got[: call.rows], want[: call.rows])
    assert not any(tickets())


def replays(call: Call, lengths: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Checks that a captured graph of a paged call follows its lengths, given as (new tokens, keys) of all sequences.

    Each replay must be right, have the bits of a call, write no other row, and put tickets and arrivals back.
    """
    q, ends, keys = (call.tensors[name] for name in ("q", "cu_seqlens_q", "seqlens_k"))
    q.nan_to_num_()
    buffers = call.poisoned_results()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run_into(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run_into(*buffers)
    for news, kvs in lengths:
        ends.copy_(prefix_sums(news, q.device))
        keys.copy_(torch.tensor(kvs, dtype=torch.int32))
        rows = sum(news)
        for buffer in buffers:
            buffer.fill_(torch.nan)
        poison(q.device)
        for _ in range(3):
            graph.replay()
        assert not any(tickets()), f"{news}: tickets and arrivals must end as they began"
        eager, want = call.run(), expected(call)
        for axis, got in enumerate(buffers):
            mine, theirs, there = (x.narrow(axis, 0, rows) for x in (got, eager[axis], want[axis]))
            assert torch.equal(mine, theirs), f"{news}: a replay and a call differ"
            error_of(mine, there, q.dtype, f"replay of {news}")
            assert got.narrow(axis, rows, got.shape[axis] - rows).isnan().all(), f"{news}: wrote past the last row"


def instances_of(call: Call) -> list[Entry]:
    """The kernels of the family for calls like this, of K's head size; first the one for short sequences."""
    chosen = pa_ops.select(problem_of(call), backend=FAMILY)
    able = [verdict.entry for verdict in chosen.reasons if verdict.eligible]
    return [chosen.entry, *(e for e in able if e.spec.head_dim == chosen.entry.spec.head_dim and e != chosen.entry)]


def on_sm90(call: Call, evidence: Evidence, what: object = "") -> tuple[Tensor, Tensor]:
    """Checks a call that the family must serve alone, by each of its kernels, and that it puts its tickets back."""
    want = expected(call)
    found = [checked(call, entry.name, evidence, what, want) for entry in instances_of(call)]
    return found[0]


def launched_by(instance: str) -> list[str]:
    """The kernels of a call by that one: where eight blocks share keys, pairs have the SMs that no eight can."""
    return [instance, f"{instance.removesuffix('c8')}c2"] if instance.endswith("c8") else [instance]


def checked(
    call: Call, instance: str, evidence: Evidence, what: object, want: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Checks a call by one kernel of the family."""
    with pa_ops.trace.recording() as calls:
        found = check(call.with_options(backend=instance), evidence, what, want)
    assert [made.instance for made in calls] == launched_by(instance)
    assert not any(tickets()), f"{what}: tickets and arrivals must end as they began"
    return found
