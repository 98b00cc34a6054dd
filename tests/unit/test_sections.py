"""Which tile a block of flash_sm80 has: templates/device/rows_sm80.py itself, with plain numbers for the DSL's."""

from __future__ import annotations

from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest

from generator.matrix import declared
from helpers import plain
from helpers.schedule import end_of
from pa_ops.plan import ceil_div, section_bits
from pa_ops.spec import Family, InstanceSpec, Mask

IMPORTED = {
    "mask_tile": {},
    "pages": {},
    "ptx": {"opaque": int},
    "worklist": dict.fromkeys(("end_of", "length_at", "paged_keys")),
}
PLACES = 264  # of blocks, two on each of an H200's SMs


def spec_of(head_dim: int, mask: Mask) -> InstanceSpec:
    """An instance of flash_sm80."""
    return next(
        spec
        for spec in declared(archs=["sm_90a"])
        if (spec.family, spec.head_dim, spec.mask) == (Family.FLASH_SM80, head_dim, mask)
    )


def places(tiles: int, heads: int, bits: int, *, causal: bool = True) -> list[tuple[int, int]]:
    """(rank, head) of each block in the order in which they start, with so many tiles a head."""
    block = [0, 0, 0]
    device = plain.run("rows_sm80", IMPORTED, block_idx=lambda: tuple(block))
    rows = device["Rows"](False, causal, False, False, 128, 64)
    found = []
    for block[1], block[0] in product(range(heads >> bits), range(tiles << bits)):
        found.append(rows.place(SimpleNamespace(section_bits=bits)))
    return found


def idle(tiles: int, heads: int, bits: int) -> float:
    """The share of time in which places have nothing to do, where tiles take as long as they have keys to see."""
    lengths = [tiles - rank for rank, _ in places(tiles, heads, bits)]
    return 1 - sum(lengths) / (PLACES * end_of(lengths, PLACES))


@pytest.mark.parametrize(("heads", "bits"), [(1, 0), (6, 1), (8, 3), (12, 2), (32, 4)])
def test_every_tile_of_every_head_is_one_blocks(heads: int, bits: int) -> None:
    found = places(5, heads, bits)
    assert Counter(found) == Counter(product(range(5), range(heads)))
    ranks = [rank for rank, _ in found[: 5 << bits]]
    assert ranks == sorted(ranks), "the heads of a section begin with their longest"
    assert {head for _, head in found[: 5 << bits]} == set(range(1 << bits))


def test_heads_take_turns_only_where_tiles_differ() -> None:
    assert places(3, 2, 0, causal=False) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    for mask in set(Mask) - {Mask.CAUSAL}:
        assert section_bits(spec_of(128, mask), 32, 4) == 0


@pytest.mark.parametrize(
    ("head_dim", "heads", "group", "section"),
    [
        (128, 32, 4, 16),
        (128, 16, 1, 4),
        (64, 32, 1, 8),
        (256, 8, 1, 2),
        (256, 16, 16, 16),
        (128, 28, 7, 4),
        (128, 5, 5, 1),
    ],
)
def test_a_section_divides_the_heads_and_its_keys_stay_in_the_cache(
    head_dim: int, heads: int, group: int, section: int
) -> None:
    assert 1 << section_bits(spec_of(head_dim, Mask.CAUSAL), heads, group) == section
    assert heads % section == 0 and ceil_div(section, group) * head_dim <= 512


@pytest.mark.parametrize(("tokens", "heads", "group"), [(4096, 32, 4), (16384, 16, 1)])
def test_places_run_out_of_tiles_at_the_same_time(tokens: int, heads: int, group: int) -> None:
    tiles, bits = tokens // 128, section_bits(spec_of(128, Mask.CAUSAL), heads, group)
    assert idle(tiles, heads, bits) < 0.03 < 0.05 < idle(tiles, heads, 0)
