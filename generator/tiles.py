"""Turns a head size, a layout and a mask into the tiles of an attention family's kernels: which were the fastest.

Measurements are in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pa_ops.capability import parse_target
from pa_ops.spec import EIGHT, PAIR, Family, InstanceSpec, Layout, Mask, Tile

from .targets import DECLARED_TARGETS


@dataclass(frozen=True)
class Cell:
    """What a preset asks of an attention family: head size, layout of K and V, mask; V's head size where it differs."""

    head_dim: int
    layout: Layout
    mask: Mask
    head_dim_v: int = 0


# Tile of each head size, by how keys are found: the fastest on an H200 of those that neither spill for sm_80 and sm_90a
# (for sm_100f and sm_120f, 128 spills 16 to 80 B a thread) nor, at 256, exceed the 99 KiB that a block may have on SM
# 8.6, 8.9 and 12.x (docs/performance.md has the others). A page look-up serves 32 keys a word, so gather tiles have a
# multiple of 32 keys.
FLASH_SM80_TILES: dict[int, dict[Layout, Tile]] = {
    64: {Layout.DENSE: Tile(128, 64, 1, 4), Layout.GATHER: Tile(128, 64, 1, 4)},
    96: {Layout.DENSE: Tile(128, 32, 1, 4), Layout.GATHER: Tile(128, 32, 1, 4)},
    128: {Layout.DENSE: Tile(128, 32, 1, 4), Layout.GATHER: Tile(128, 32, 1, 4)},
    256: {Layout.DENSE: Tile(64, 64, 1, 4), Layout.GATHER: Tile(64, 64, 1, 4)},
}
# Those of dense keys without a window where a target has room for more: registers at 128, and at 256 shared memory,
# for eight warps, two of which share 32 rows.
FLASH_SM80_LARGE_TILES: dict[str, dict[int, Tile]] = {
    "sm_80": {128: Tile(128, 48, 1, 4)},
    "sm_90a": {128: Tile(128, 64, 1, 4), 256: Tile(128, 96, 1, 8)},
}
# Tile of each head size for wgmma: 64 query rows a computing warpgroup beside one that copies,
# and as many keys and stages as shared memory and registers hold. Keys are a multiple of 16, the rows of a copy's box
# for the smallest usual page.
FLASH_SM90_TILES: dict[int, Tile] = {
    64: Tile(192, 128, 2, 16),
    96: Tile(192, 96, 5, 16),
    128: Tile(128, 128, 3, 12),
    192: Tile(128, 96, 2, 12),
    256: Tile(128, 80, 2, 12),
}
# A second one for long sequences and for heads of a group packed side by side: 12% faster on 16k tokens; on 512, 20%
# slower by one head, 7% faster by four.
FLASH_SM90_TALL_TILES: dict[int, Tile] = {128: Tile(192, 80, 4, 16)}
# Tile where V's head size is smaller, by both sizes: DeepSeek's latent attention, unfolded for prefill. Pairs that it
# does not hold go to the kernel of the larger size.
FLASH_SM90_SPLIT_TILES: dict[tuple[int, int], Tile] = {(192, 128): Tile(128, 128, 2, 12)}
# By head size, or by both: those of a block by itself, the taller later.
FLASH_SM90_LONE_TILES: tuple[Mapping[Any, Tile], ...] = FLASH_SM90_TILES, FLASH_SM90_TALL_TILES, FLASH_SM90_SPLIT_TILES
# The tallest again for two blocks that share keys, in long sequences that have no window: 1 to 5% faster, by the energy
# that their reads take.
FLASH_SM90_PAIR_TILES: dict[int | tuple[int, int], Tile] = {
    sizes: replace(tile, cluster=PAIR) for table in FLASH_SM90_LONE_TILES for sizes, tile in table.items()
}
# And for eight, beside pairs on the SMs that no eight can have (pa_ops/portions.py), where all rows see the same keys:
# 3 to 4% faster at 256, where three quarters of the reads that are left are worth most.
FLASH_SM90_EIGHT_TILES: dict[int | tuple[int, int], Tile] = {256: replace(FLASH_SM90_TILES[256], cluster=EIGHT)}
# Those of the two grids that share a batch's tiles out.
FLASH_SM90_PORTION_TILES: frozenset[Tile] = frozenset(
    replace(tile, cluster=cluster) for tile in FLASH_SM90_EIGHT_TILES.values() for cluster in (PAIR, EIGHT)
)
# Those whose groups of 64 rows, without a window, leave out blocks of keys that only the other groups see: 6% faster
# with grouped heads and with pages, at 96 3% faster on 512 tokens; other tiles lose 5% or gain nothing
# (docs/performance.md). The first of two blocks has no use for the second's last keys, at any head size.
FLASH_SM90_SKIPPING_TILES: frozenset[Tile] = frozenset(
    (
        FLASH_SM90_TILES[96],
        *FLASH_SM90_TALL_TILES.values(),
        *FLASH_SM90_PAIR_TILES.values(),
        *FLASH_SM90_EIGHT_TILES.values(),
    )
)
# The tile with a mask tensor: threads load spans of 32 keys of it, and hold them beside the scores.
FLASH_SM90_TENSOR_TILES: dict[int, Tile] = {
    64: Tile(128, 128, 3, 12),
    96: Tile(128, 128, 4, 12),
    128: Tile(128, 128, 3, 12),
    192: Tile(128, 96, 2, 12),
    256: Tile(128, 64, 2, 12),
}
# Tile of each head size for few query rows: as many stages as let two blocks share an SM, or else one.
DECODE_TILES: dict[int, Tile] = {
    64: Tile(16, 128, 3, 4),
    96: Tile(16, 64, 4, 4),
    128: Tile(16, 64, 3, 4),
    192: Tile(16, 64, 2, 4),
    256: Tile(16, 64, 3, 4),
}
# Tiles of each head size in CUDA C++ by the oldest SM that gets them, newest first: the fastest on an H200 through the
# PTX of sm_75, or as sm_90a, of those that never spill there (docs/performance.md). Before SM 7.0 a block may have no
# more than 48 KiB, and no path has use for a tall one.
MEA_TILES: dict[int, dict[int, Tile]] = {
    64: {53: Tile(128, 64, 1, 4)},
    128: {70: Tile(128, 32, 1, 4), 53: Tile(64, 32, 1, 4)},
    256: {75: Tile(64, 64, 1, 4), 53: Tile(64, 16, 1, 4)},
    512: {80: Tile(32, 16, 1, 4), 75: Tile(32, 16, 1, 8), 70: Tile(32, 16, 1, 4), 53: Tile(16, 16, 1, 4)},
}
# Few query rows: each warp has 16 keys a step.
MEA_DECODE_TILES: dict[int, Tile] = dict.fromkeys((64, 128, 256), Tile(16, 64, 1, 4))
# At 128 x 32 the window's two edges need six registers too many. Those with a mask tensor have both edges, too, and a
# tile of the mask, which leaves 256 fewer keys in 99 KiB.
TILE_EXCEPTIONS: dict[Cell, Tile] = {
    Cell(128, Layout.DENSE, Mask.WINDOW): Tile(64, 48, 1, 4),
    Cell(256, Layout.DENSE, Mask.TENSOR): Tile(64, 32, 1, 4),
}
TILES = {  # of the families with one tile a head size, or one for most calls
    Family.FLASH_SM90: FLASH_SM90_TILES,
    Family.DECODE: DECODE_TILES,
    Family.MEA_DECODE: MEA_DECODE_TILES,
}


def _mea_tile(head_dim: int, target: str) -> Tile:
    """The tile of the family `mea` that a target gets."""
    return next(tile for oldest, tile in MEA_TILES[head_dim].items() if parse_target(target) >= oldest)


def _flash_sm80_tile(cell: Cell, target: str) -> Tile:
    """The tile of the family `flash_sm80` that a target gets."""
    usual = TILE_EXCEPTIONS.get(cell, FLASH_SM80_TILES[cell.head_dim][cell.layout])
    if cell.layout is Layout.GATHER or cell.mask not in (Mask.FULL, Mask.CAUSAL):
        return usual
    return FLASH_SM80_LARGE_TILES.get(target, {}).get(cell.head_dim, usual)


def _flash_sm90_tiles(cell: Cell) -> tuple[Tile, ...]:
    """The tiles of the family `flash_sm90`, for sizes to choose from."""
    sizes = (cell.head_dim, cell.head_dim_v) if cell.head_dim_v else cell.head_dim
    tables = FLASH_SM90_LONE_TILES
    if cell.mask is not Mask.WINDOW:
        tables = *tables, FLASH_SM90_PAIR_TILES
    if cell.mask is Mask.FULL:
        tables = *tables, FLASH_SM90_EIGHT_TILES
    return tuple(table[sizes] for table in tables if sizes in table)


def is_other_tile(spec: InstanceSpec, target: str) -> bool:
    """Whether `target` gets another tile for what `spec` serves."""
    if spec.family is Family.FLASH_SM80:
        return spec.tile != _flash_sm80_tile(Cell(spec.head_dim, spec.layout, spec.mask), target)
    return spec.family is Family.MEA and spec.tile != _mea_tile(spec.head_dim, target)


def tiles_of(family: Family, cell: Cell) -> tuple[Tile, ...]:
    """The tiles of an attention family's kernels for `cell`: a rule leaves a target one, or sizes choose."""
    if family is Family.FLASH_SM80:
        return tuple(dict.fromkeys(_flash_sm80_tile(cell, target) for target in DECLARED_TARGETS))
    if family is Family.FLASH_SM90 and cell.mask is Mask.TENSOR:
        return (FLASH_SM90_TENSOR_TILES[cell.head_dim],)
    if family is Family.FLASH_SM90:
        return _flash_sm90_tiles(cell)
    if family is Family.MEA:
        return tuple(dict.fromkeys(MEA_TILES[cell.head_dim].values()))
    return (TILES[family][cell.head_dim],)
