"""Which tiles are listed again, and when: templates/device/lister.py and again.py themselves, with plain numbers."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import plain

SLOTS, SLOT, BARRIER = 2, 76, 8
PLACES = {"AGAIN": 68, "TURN": 72, "HEAD": 16, "TOKEN": 8}
LENGTHS = ("keys_of", "wait_for_grid", "find_tile", "length_at", "paged_keys", "tiles_of", "end_of", "step_of")
NOTHING = {"wait_for": lambda barrier, parity: None, "arrive_at": lambda barrier: None}
SHARED = SimpleNamespace(slots=1000, lost=2000, asked=3000, slot_full=4000, slot_empty=5000)


class Work:
    """Slots of a block's tiles, some of which are lost when they have been computed; the list that comes of it."""

    trusts = True

    def __init__(self, lost: tuple[bool, ...]) -> None:
        self.will_be_lost = lost
        self.slots: dict[int, tuple[int, bool]] = {}  # the tile of each, and whether it was listed again
        self.listed: list[tuple[int, bool]] = []

    def put(self, tile: int, turn: int, *, again: bool) -> None:
        """List a tile in the slot of a turn, which must be the next one."""
        assert turn == len(self.listed), "a turn for each listing"
        old = self.slots.get(turn % SLOTS)
        assert old is None or not self.is_lost(*old), "nothing lost is written over"
        self.slots[turn % SLOTS] = tile, again
        self.listed.append((tile, again))

    def is_lost(self, tile: int, again: bool) -> bool:
        return self.will_be_lost[tile] and not again

    def lost(self, smem: int, turn: int) -> int:
        """As `Again.lost`: 5 warps' bits, of the tile that was in the slot of that turn."""
        here = self.slots.get(turn % SLOTS)
        return 0b10101 if here is not None and self.is_lost(*here) else 0

    def list(self, smem: int, source: int, turn: int, lost: int) -> None:
        """As `Again.list`."""
        assert lost == 0b10101
        tile, again = self.slots.pop(source % SLOTS)
        assert not again, "no tile is lost twice"
        self.put(tile, turn, again=True)


def lister(work: Work) -> Any:
    """A listing warp of that work."""
    ptx = {"ld_shared_32": lambda at: 0, "st_shared_32": lambda at, word: None}
    names = ("place_of", "sections_of", "pack_bits", "token_of", "divided", "take")
    others = dict.fromkeys((*names, *LENGTHS))
    others |= {"STATES": 4, "GROUP_ROWS": 64, "columns_of": None, "st_global_i32": None}
    modules = ["mask_tile", "order", "packing", "parts", "ptx_global", "ptx_grid", "quotients", "stretches"]
    modules += ["warpgroup", "worklist"]
    shared = {"BARRIER": BARRIER, "SLOT": SLOT, "SLOTS": SLOTS, **PLACES, **others}
    imported = {"tma": NOTHING, "ptx": ptx, "shared_sm90": shared, **dict.fromkeys(modules, others)}
    kind = plain.run("lister", imported)["Lister"]
    made = kind.__new__(kind)
    vars(made).update(again=work, shared=SHARED, copy_queries=lambda *words: None)
    return made


@pytest.mark.parametrize("tiles", range(6))
def test_every_lost_tile_is_listed_once_more_before_the_end(tiles: int) -> None:
    for lost in product((False, True), repeat=tiles):
        work, turn = Work(lost), 0
        warp = lister(work)
        for tile in range(tiles):
            work.put(tile, turn, again=False)
            turn = warp.list_lost(None, 0, 0, turn + 1)
        turn = warp.list_lost(None, 0, 0, turn, last=True)
        assert turn == len(work.listed), "the end comes in the turn after"
        assert [tile for tile, again in work.listed if not again] == list(range(tiles))
        assert sorted(tile for tile, again in work.listed if again) == [t for t in range(tiles) if lost[t]]


def test_a_slot_that_is_listed_again_is_the_same_but_for_its_turn_and_its_warps() -> None:
    words = {SHARED.slots + SLOT + 4 * i: 100 + i for i in range(SLOT // 4)} | {SHARED.lost + 4: 0b11}
    arrived, warp = list[int](), SimpleNamespace(lane=0)
    ptx = {"ld_shared_32": lambda at: words[at], "st_shared_32": words.__setitem__, "opaque": int}
    softmax, shared = {"row_elements": None}, {"BARRIER": BARRIER, "GROUP_WARPS": 4, "SLOT": SLOT, "SLOTS": SLOTS}
    modules = {
        "tma": {**NOTHING, "arrive_at": arrived.append},
        "trust": {},
        "ptx": ptx,
        "shared_sm90": {**shared, **PLACES},
        "softmax": softmax,
    }
    names = plain.run("again", modules, lane_idx=lambda: warp.lane, sync_warp=lambda: None)
    again = names["Again"](SHARED, SimpleNamespace(blocks=2), trusts=True)
    assert again.lost(0, 3) == 0b11
    for warp.lane in reversed(range(32)):  # the first lane says that all have written
        again.list(0, 3, 4, 0b11)
    wanted = {4 * i: 100 + i for i in range(SLOT // 4)} | {PLACES["AGAIN"]: 0b11, PLACES["TURN"]: 4}
    assert {at: words[SHARED.slots + at] for at in wanted} == wanted
    assert words[SHARED.lost + 4] == 0 and arrived == [SHARED.slot_full]


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_what_a_warp_has_lost_is_a_bit_of_its_block_and_all_blocks_list_the_tile_again(blocks: int) -> None:
    """Warp 1 of the last block loses its rows: it alone gives none away, and it alone does when all list them again."""
    lost, place = [0] * blocks, SimpleNamespace(block=0, warp=0, again=0)
    at = SHARED.slots + PLACES["AGAIN"]
    words = {"ld_shared_32": lambda address: place.again if address == at else 0, "st_shared_32": None}
    owner = blocks - 1, 1

    def tell(word: int, own: int, bits: int) -> None:
        assert word == SHARED.lost, "of the slot's turn"
        for block in range(blocks):
            lost[block] |= bits
        lost[place.block] |= own

    trust = {"extraordinary": lambda sums: sums[0] > 1, "broken": lambda sums, outputs: sums[0] > 1}
    shared = {"BARRIER": BARRIER, "GROUP_WARPS": 4, "SLOT": SLOT, "SLOTS": SLOTS, **PLACES}
    modules = {"tma": NOTHING, "trust": trust, "ptx": words, "shared_sm90": shared}
    arch = {"lane_idx": lambda: 0, "warp_idx": lambda: 4 + place.warp, "vote_any_sync": bool}
    names = plain.run("again", {**modules, "softmax": {"row_elements": lambda r, count: range(2)}}, **arch)
    again = names["Again"](SHARED, SimpleNamespace(blocks=blocks, tell=tell), trusts=True)

    def giving() -> set[tuple[int, int]]:
        """The warps that give their rows away, of those that some block lists."""
        given = set()
        for place.block, place.warp in product(range(blocks), range(8)):
            place.again = listed[place.block]
            total = 2.0 if (place.block, place.warp) == owner and not place.again else 1.0
            if again.settle(0, SHARED.slots, [0.0] * 8, [0.0, 0.0], [total, 1.0]):
                given.add((place.block, place.warp))
        return given

    listed = [0] * blocks
    assert giving() == set(product(range(blocks), range(8))) - {owner}
    assert all(lost), "every block lists the tile again"
    listed = lost.copy()
    assert giving() == {owner} and listed == lost, "and no more is lost"
