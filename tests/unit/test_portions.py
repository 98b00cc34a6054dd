"""How two grids share a batch's tiles out: pa_ops/portions.py, templates/device/portions.py with plain numbers, and the
launches of a call."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import plain
from helpers.cuda_calls import batch, call
from helpers.launches import EIGHTS, SM90, Launches
from pa_ops import registry, trace
from pa_ops.portions import QUARTERS, Portion, shared_out, whole
from pa_ops.scratch import PARTS_AN_SM, parts_at, tiles_at
from pa_ops.spec import EIGHT, PAIR

EIGHT_BLOCKS = "pa_attn_flash_sm90_fp16_kvfp16_d256v256_gather_full_m128n80s2w12c8"
Portions = plain.run("portions", {"quotients": plain.run("quotients", {})})["Portions"]


def quarters_of(portion: Portion, units: int, *, taken: bool = True) -> Counter[tuple[int, int]]:
    """The quarters of units, of so many, that a grid computes, by the ranks that it counts."""
    args, found = SimpleNamespace(**portion.fields()), Counter[tuple[int, int]]()
    device = Portions(SimpleNamespace(count=lambda: portion.clusters), taken)
    assert device.at_once(args) == portion.at_once
    assert device.tokens_of_unit(args, 128 * portion.cluster) == 128 * max(portion.cluster, taken * portion.second * 8)
    tiles = device.tiles_among(args, units)
    ranks = [device.unit_of(args, tile) for tile in range(tiles + 3)]
    assert all(unit < units for unit, _ in ranks[:tiles]) and all(unit >= units for unit, _ in ranks[tiles:])
    for past in range(3):
        assert device.past(args, tiles + past, ranks[tiles + past][0], ranks[tiles + past][0] - units) == past
    for unit, quarter in ranks[:tiles]:
        found.update([(unit, quarter)] if portion.second else [(unit, each) for each in range(QUARTERS)])
    return found


@given(st.integers(2, 200), st.integers(0, 40), st.integers(0, 3000))
def test_every_tile_is_one_grids_and_no_sm_has_two_blocks(num_sms: int, eights: int, units: int) -> None:
    portions = shared_out(num_sms, min(eights, num_sms // EIGHT))
    found = sum((quarters_of(portion, units) for portion in portions), Counter())
    assert found == dict.fromkeys([(unit, quarter) for unit in range(units) for quarter in range(QUARTERS)], 1)
    assert sum(portion.blocks for portion in portions) <= num_sms
    assert len({portion.at_once for portion in portions}) == 1, "both find the same order of tiles"
    if len(portions) == 2:
        assert [portion.cluster for portion in portions] == [EIGHT, PAIR]
        assert [portion.second for portion in portions] == [False, True]
        assert portions[1].first_state == portions[0].blocks * PARTS_AN_SM, "states are kept apart"
        assert len({portion.tickets_at(num_sms) for portion in portions}) == 2, "and so are tickets"


@pytest.mark.parametrize(
    ("num_sms", "eights", "blocks"),
    [(132, 15, [120, 12]), (132, 16, [128, 4]), (132, 0, [132]), (114, 14, [112, 2]), (72, 9, [72]), (16, 1, [8, 8])],
)
def test_pairs_have_the_sms_that_eights_cannot(num_sms: int, eights: int, blocks: list[int]) -> None:
    portions = shared_out(num_sms, eights)
    assert [portion.blocks for portion in portions] == blocks
    units = 10_000
    shares = [sum(quarters_of(portion, units).values()) / (QUARTERS * units) for portion in portions]
    assert shares == pytest.approx([count / sum(blocks) for count in blocks], abs=0.01), "as many as they have SMs"


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_a_grid_by_itself_has_every_tile(cluster: int) -> None:
    portion = whole(132, cluster)
    assert (portion.blocks, portion.at_once) == (132 // cluster * cluster, 132 // cluster)
    assert portion.fields() == {"at_once": 132 // cluster, "every": 0, "unit_bits": 0, "first_state": 0}
    assert portion.tickets_at(132) == tiles_at(132) < parts_at(132)
    for taken in (False, True):  # a kernel that could be one of two grids is as well by itself
        assert len(quarters_of(portion, 57, taken=taken)) == QUARTERS * 57


def test_X12_clusters_of_eight_leave_every_eleventh_tile_to_pairs_on_the_other_sms(launches: Launches) -> None:
    """All else of the two launches is one call's, and their rooms in the workspace are two."""
    arguments = {"causal": False, "backend": EIGHT_BLOCKS}
    with trace.recording() as decisions:
        call("paged_attention", *batch(40, dim=256), **arguments)
    eights, pairs = launches
    assert [made.symbol for made in launches] == [made.instance for made in decisions]
    assert [made.symbol for made in launches] == [EIGHT_BLOCKS, EIGHT_BLOCKS.replace("c8", "c2")]
    assert [(made.x, made.y) for made in launches] == [(8 * EIGHTS, 1), (SM90.num_sms - 8 * EIGHTS, 1)]
    differ = {name: (eights.fields[name], pairs.fields[name]) for name in eights.fields}
    differ = {name: values for name, values in differ.items() if values[0] != values[1]}
    tickets, rows, boxes = (differ.pop(name) for name in ("tickets", "box_rows", "boxes"))
    assert differ == {"beside": (0, 1), "unit_bits": (0, 2), "first_state": (0, 8 * EIGHTS * PARTS_AN_SM)}
    assert tickets[1] == tickets[0] + 4 and (rows, boxes) == ((8, 16), (10, 5)), "each of eight copies as much"
    for name, found in eights.maps.items():
        assert found._replace(box=pairs.maps[name].box) == pairs.maps[name]
    assert (eights.fields["every"], eights.fields["at_once"]) == (11, 16)


@pytest.mark.parametrize("held", [0, 16])
def test_where_all_sms_are_of_one_kind_there_is_one_launch(
    launches: Launches, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = replace(SM90, num_sms=128)
    monkeypatch.setattr(registry, "capability_of", lambda index: capability)
    monkeypatch.setattr("helpers.launches.EIGHTS", held)
    call("paged_attention", *batch(40, dim=256), causal=False, backend=EIGHT_BLOCKS)
    [made] = launches
    assert made.symbol.endswith("c8" if held else "c2") and made.x == capability.num_sms
    assert [made.fields[name] for name in ("every", "unit_bits", "beside", "first_state")] == [0] * 4


def test_clusters_of_eight_have_all_tiles_where_pairs_are_not_built(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.Registry, "sibling", lambda *_: None)
    call("paged_attention", *batch(40, dim=256), causal=False, backend=EIGHT_BLOCKS)
    [made] = launches
    assert (made.symbol, made.x, made.fields["every"]) == (EIGHT_BLOCKS, SM90.num_sms // 8 * 8, 0)
