"""Which blocks of decode leave their SM to prefill: templates/device/beside.py itself, with plain numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import plain

SMS = 132


class Device:
    """The counter of tickets, and the SM of the block whose turn it is."""

    def __init__(self) -> None:
        self.counter, self.sm = 0, 0

    def add_to(self, _: object, count: int) -> int:
        before = self.counter
        self.counter += count
        return before

    def store(self, _: object, value: int) -> None:
        self.counter = value

    def own_sm(self) -> int:
        return self.sm


device = Device()
beside = SimpleNamespace(
    **plain.run(
        "beside",
        {
            "ptx": {"rcp": lambda x: 1 / x},
            "ptx_global": {"add_to": device.add_to, "st_global_i32": device.store},
            "ptx_grid": {"own_sm": device.own_sm},
        },
    )
)


def arguments(most_given: int = SMS // 4, **more: int) -> SimpleNamespace:
    return SimpleNamespace(sms=SMS, most_given=most_given, tickets=None, causal=1, group=4, kv_heads=8, **more)


@given(st.integers(0, SMS // 4), st.integers(1, 2), st.randoms(use_true_random=False), st.data())
def test_as_many_blocks_stay_as_there_are_shares_wherever_they_run(
    sms: int, on_an_sm: int, order: random.Random, data: st.DataObject
) -> None:
    """Every share is taken once, and the counter is zero again: on a device that numbers its SMs from 0, and on one
    that does not."""
    args, grid, spare = arguments(), SMS * on_an_sm, sms * on_an_sm
    places = [block % SMS for block in range(grid)]
    if data.draw(st.booleans()):
        places = [data.draw(st.integers(0, 2 * SMS)) for _ in range(grid)]
    order.shuffle(places)
    asked = []
    for device.sm in places:  # some ask early, before it is known how many may leave
        asked.append((device.sm, beside.draw_early(args)))
    order.shuffle(asked)
    drawn, left = [], []
    for device.sm, early in asked:
        drawn.append(beside.draw(args, grid, sms, spare, early))
        if drawn[-1] < 0:
            left.append(device.sm)
    stayed = [ticket for ticket in drawn if ticket >= 0]
    assert sorted(stayed) == list(range(len(stayed))) and len(stayed) >= grid - spare
    assert device.counter == 0
    if sorted(places) == sorted([*range(SMS)] * on_an_sm):
        assert sorted(left) == sorted([*range(SMS - sms, SMS)] * on_an_sm), "whole SMs, and as many as may be"


@pytest.mark.parametrize(
    ("long", "short", "sms"),
    [
        ([], [4096] * 64, 0),
        ([(1024, 1024)], [4096] * 63, 5),
        ([(1024, 1024)] * 8, [4096] * 56, SMS // 4),  # more than decode's time, but in short pieces
        ([(512, 4096)], [2048] * 31, 0),  # each piece takes as long as decode
        ([(2048, 8192)], [300], 0),
        ([(70, 70)], [100_000] * 64, 1),
    ],
)
def test_sms_are_left_for_what_is_done_when_decode_ends(
    long: list[tuple[int, int]], short: list[int], sms: int
) -> None:
    args, tile = arguments(), 64
    parts = [beside.work_of(args, queries, -(-keys // tile), tile) for queries, keys in long]
    blocks, work = (sum(part[i] for part in parts) for i in (0, 1))
    assert beside.given(args, sum(-(-keys // tile) for keys in short), blocks, work) == sms


def test_nothing_is_left_to_a_grid_that_runs_alone() -> None:
    blocks, work = beside.work_of(arguments(), 1024, 16, 64)
    assert beside.given(arguments(most_given=0), 4000, blocks, work) == 0
