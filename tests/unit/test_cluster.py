"""Which block of a cluster copies what, and when all agree: templates/device/cluster.py itself, with plain numbers."""

from __future__ import annotations

from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from generator.tiles import FLASH_SM90_EIGHT_TILES, FLASH_SM90_PAIR_TILES
from helpers import plain
from pa_ops.plan import box_keys, ceil_div, columns_of


class Blocks:
    """A grid of them, the one whose turn it is, and the barriers at which each has heard of something."""

    def __init__(self, blocks: int) -> None:
        self.grid, self.number, self.blocks = 0, 0, blocks
        self.words, self.told, self.sent = dict[int, int](), list[tuple[Any, ...]](), list[int]()

    def send(self, block: int, at: int, barrier: int, word: int) -> None:
        """Note whom a word is for; all blocks have the same address of it."""
        self.sent.append(block)
        self.words[at] = word

    def run(self) -> Any:
        """The names of the module."""
        arch = {
            "grid_dim": lambda: (self.grid, 1, 1),
            "block_idx": lambda: (self.number, 0, 0),
            "block_idx_in_cluster": lambda: self.number % self.blocks,
        }
        waits = {
            "wait_for": lambda barrier, parity: self.told.append(("wait", barrier, parity)),
            "expect": lambda barrier, count: self.told.append(("expect", barrier, count)),
        }
        instructions = {
            "arrive_in": lambda block, barrier: self.told.append(("arrive", block, barrier)),
            "or_in": lambda block, at, bits: self.told.append(("or", block, at, bits)),
            "send": self.send,
        }
        modules = {"tma": waits, "ptx": {"ld_shared_32": self.words.__getitem__}, "ptx_cluster": instructions}
        return SimpleNamespace(**plain.run("cluster", modules, **arch))


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_the_blocks_of_a_grid_are_shared_out_to_clusters(blocks: int) -> None:
    device = Blocks(blocks)
    cluster = device.run().Cluster(blocks)
    device.grid, places = 120, []
    for number in range(120):
        device.number = number
        places.append((cluster.number(), cluster.mate()))
    assert places == list(product(range(cluster.count()), range(blocks)))
    assert cluster.shape() == (None if blocks == 1 else [blocks, 1, 1])


ROWS = [
    (head_dim, tile)
    for sizes, tile in (*FLASH_SM90_PAIR_TILES.items(), *FLASH_SM90_EIGHT_TILES.items())
    for head_dim in (sizes if isinstance(sizes, tuple) else (sizes,))
]


@pytest.mark.parametrize("page_size", [0, 8, 16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize(("head_dim", "tile"), ROWS, ids=str)
def test_each_box_is_copied_by_one_block_and_all_copy_as_many(head_dim: int, tile: Any, page_size: int) -> None:
    device = Blocks(tile.cluster)
    cluster = device.run().Cluster(tile.cluster)
    keys, columns = box_keys(tile, page_size), head_dim // columns_of(head_dim)
    assert tile.n % keys == (page_size or keys) % keys == 0 and keys % 8 == 0, "whole boxes, of whole swizzles"
    copied = Counter[int]()
    for box, column in product(range(tile.n // keys), range(columns)):
        owners = []
        for device.number in range(tile.cluster):
            owners += [device.number] * cluster.copies(box, column, columns)
        assert len(owners) == 1, (box, column)
        copied.update(owners)
    assert max(copied.values()) <= ceil_div(sum(copied.values()), tile.cluster)


@pytest.mark.parametrize("blocks", [2, 8])
def test_the_others_hear_every_word_of_the_first_block_and_say_so(blocks: int) -> None:
    device = Blocks(blocks)
    cluster = device.run().Cluster(blocks)
    shared = SimpleNamespace(word=100, word_full=8, word_empty=16)
    for turn, word in enumerate((66, 67, 70)):
        heard = []
        for device.number in range(blocks):
            heard.append(cluster.agree(1000, shared, turn, word if device.number == 0 else 0))
        assert heard == [word] * blocks
        assert device.sent[-blocks + 1 :] == [*range(1, blocks)], "to each of the others"
    others = blocks - 1
    parities = [(told[1] - 1000, told[2]) for told in device.told if told[0] == "wait"]
    wanted = [wait for turn in range(3) for wait in ((16, (turn + 1) & 1), *[(8, turn & 1)] * others)]
    assert parities == wanted, "empty before the first word is written"
    told = ("arrive", 0, 1016), ("expect", 1008, 4)
    assert [device.told.count(each) for each in told] == [3 * others] * 2


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_what_a_warp_tells_is_in_a_word_of_every_block_and_its_own_bit_in_that_of_its_own(blocks: int) -> None:
    device = Blocks(blocks)
    cluster = device.run().Cluster(blocks)
    device.number = blocks - 1
    cluster.tell(40, 1 << 5, 1 << 16)
    everywhere = [("or", block, 40, 1 << 16) for block in range(blocks)]
    assert sorted(device.told) == sorted([*everywhere, ("or", blocks - 1, 40, 1 << 5)])
