"""Workspaces by stream, with CPU memory in place of a device's: who gets which, eagerly and under capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pa_ops import scratch

NUM_SMS = 2
POSTS, COUNTERS = scratch.posts_at(NUM_SMS) // 4, scratch.counters_at(NUM_SMS) // 4


class Device:
    """A device with one current stream, which may be under capture."""

    def __init__(self) -> None:
        self.stream = 0
        self.capturing = False
        self.waits = 0

    def wait(self, device: int) -> None:
        """Notes a synchronisation, which capture would not allow."""
        assert not self.capturing
        self.waits += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(scratch, "held", {})
    monkeypatch.setattr(scratch, "_spare", {})
    monkeypatch.setattr(scratch, "stream_of", lambda device: made.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=NUM_SMS)
    )
    monkeypatch.setattr(torch, "device", lambda kind, index: "cpu")
    return made


def test_a_stream_keeps_its_own_and_waits_once(device: Device) -> None:
    first = scratch.workspace(0)
    assert scratch.workspace(0) is first and device.waits == 1
    device.stream = 1
    second = scratch.workspace(0)
    assert second is not first and scratch.workspace(0) is second
    device.stream = 0
    assert scratch.workspace(0) is first
    for room in (first, second):
        arrivals = scratch.blocks_of(NUM_SMS) + NUM_SMS * scratch.PARTS_AN_SM * scratch.MOST_WARPS
        assert room.numel() == COUNTERS + arrivals + 3 and not room[COUNTERS:].any()
        assert (room[POSTS:COUNTERS] == -1).all(), "posts are empty"


def test_counters_follow_each_other_to_the_last_word(device: Device) -> None:
    """One a share, three of tickets, one for each warp of each SM's part of a tile."""
    size = 4 * scratch.workspace(0).numel()
    parts, tickets = scratch.parts_at(NUM_SMS), scratch.tickets_at(NUM_SMS)
    assert tickets == parts - 12 == scratch.counters_at(NUM_SMS) + 4 * scratch.blocks_of(NUM_SMS)
    assert size == parts + 4 * NUM_SMS * scratch.PARTS_AN_SM * scratch.MOST_WARPS
    tiles = scratch.tiles_at(NUM_SMS), scratch.second_tiles_at(NUM_SMS)
    assert tiles == (parts - 8, parts - 4), "grids that run at the same time count by themselves"


def test_X6_a_stream_met_under_capture_gets_the_spare_and_shares_it_with_later_graphs(device: Device) -> None:
    eager = scratch.workspace(0)
    device.stream, device.capturing = 7, True
    captured = scratch.workspace(0)
    assert captured is not eager and device.waits == 1
    assert scratch.workspace(0) is captured, "a second graph must not rely on zeros that the first one's replay writes"
    assert not captured[COUNTERS:].any()


def test_X6_without_a_spare_memory_that_a_graph_zeroes_is_not_kept(device: Device) -> None:
    device.capturing = True
    first, second = scratch.workspace(0), scratch.workspace(0)
    assert first is not second and not first[COUNTERS:].any() and not second[COUNTERS:].any()
    device.capturing = False
    kept = scratch.workspace(0)
    assert kept is not first and scratch.workspace(0) is kept and device.waits == 1


def test_E11_the_workspace_holds_so_many_states_a_block_and_no_sequence_makes_it_grow() -> None:
    """Two of every share, or all chunks of a sequence: test_cuts.py."""
    sms, rows, widest = 132, 16, 256
    blocks = 2 * sms
    assert scratch.posts_at(sms) == 17 * blocks * rows * (widest + 2) * 4
    assert scratch.counters_at(sms) == scratch.posts_at(sms) + blocks * rows * (widest + 4) * 4
    assert scratch.tickets_at(sms) == scratch.counters_at(sms) + blocks * 4
