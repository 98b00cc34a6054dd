"""How a row of key tiles is cut: turns a share into its tiles, and a tile into the share and the chunk that hold it.

Plain arithmetic, the same for whoever asks. A *cut* is four numbers: all tiles; shares, the tiles that each has, and
how many more, in parts of 2^22. A *place* is the run of tiles of one head and row block of a sequence: where it starts
in the row, the number of its first tile among the sequence's keys, its tiles, the logarithm of the tiles of its chunks.
Chunks begin at multiples of their size, counted from the sequence's first key.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from pa_ops.templates.device.quotients import divided

SPREAD_BITS = 22  # of a fraction of a tile: exact for fewer than 2048 shares
IDLE = 32  # one block of so many may be left without a share, so that shares end where places do
LONG = 256  # tiles of a share, from which on a block without one costs more than places that are cut do


def start_of(cut, share):
    """The first tile of a share. Those with one tile more are spread evenly, or else neighbours would have them.

    With all of them in neighbours 1 x 128k was 2% slower; that blocks next to each other run on SMs next to each other,
    which may share a way to memory, is a supposition.
    """
    _, _, each, spread = cut
    return share * each + Int32(Uint32(share * spread) >> SPREAD_BITS)


def even(total, places, blocks):
    """Shares of `total` tiles in `places` of as many each, for `blocks` blocks: the most that end where places do, or
    divide each place alike; `blocks` where too many blocks would have none.

    A place that is cut is computed by two, and what one of them has found waits for the other: 63 x 4k by 252 shares of
    two places took 268.4 us, by 250 and 254 272.5, prefill beside them.
    """
    a_share = cutlass.max(divided(places + (blocks - 1), blocks), 1)
    a_place = divided(blocks, places)
    shares = divided(places, a_share)
    fits = shares * a_share == places
    shares = Int32(cutlass.select_(a_place > 0, a_place * places, shares))
    fits = (fits | (a_place > 0)) & (shares * IDLE >= blocks * (IDLE - 1)) & (total < blocks * LONG)
    return Int32(cutlass.select_(fits, shares, blocks))


def bounds(cut, share):
    """(begin, end) of a share; nothing beyond the last."""
    total, blocks, _, _ = cut
    begin = Int32(cutlass.select_(share < blocks, start_of(cut, share), total))
    return begin, Int32(cutlass.select_(share < blocks, start_of(cut, share + 1), total))


def owner_of(cut, tile):
    """The share that holds `tile`. A product in fp32 is it or a neighbour, for up to 2^20 shares: a 64-bit division
    takes 130 instructions."""
    total, blocks, _, _ = cut
    owner = cutlass.min(Int32(Float32(tile) * (Float32(blocks) / Float32(total))), blocks - 1)
    owner = owner + Int32(start_of(cut, owner + 1) <= tile)
    return owner - Int32(start_of(cut, owner) > tile)


class Place(NamedTuple):
    """One head and row block of a sequence; `tile` below counts from its first."""

    start: Int32
    first: Int32
    tiles: Int32
    bits: Int32


def chunk_bits(least, tiles, most):
    """The logarithm of the tiles of a chunk, where a sequence has `tiles`: the smallest from `least` on with which
    2^`most` chunks suffice, or one more where the first begins before the window.

    It follows from that sequence's own length. Where `least` is larger than any length, one chunk holds all.
    """
    return cutlass.max(least, 32 - Int32(cute.arch.clz((tiles - 1) >> most)))


def chunk_at(place, tile):
    """The number, in its place, of the chunk that holds `tile`."""
    return ((place.first + tile) >> place.bits) - (place.first >> place.bits)


def chunk_begin(place, tile):
    """The first tile of the chunk that holds `tile`."""
    return cutlass.max(tile - ((place.first + tile) & ((Int32(1) << place.bits) - 1)), 0)


def chunk_left(place, tile):
    """Tiles from `tile` on to the end of its chunk."""
    size = Int32(1) << place.bits
    return cutlass.min(place.tiles - tile, size - ((place.first + tile) & (size - 1)))


class Part(NamedTuple):
    """What a block has computed of a place that is cut, and how the place's states lie in the workspace.

    base, skip, step: state i, in the order in which they are merged, is at `base`, for i = 0, or `base` + `skip` + i *
    `step`; states: how many there will be; mine: the number of this one; more: 1 where it joins what is there already;
    counter: on which those who leave states meet; meets: 1 where this one does, else `last` is 1 if it is the last.
    """

    base: Int32
    skip: Int32
    step: Int32
    states: Int32
    mine: Int32
    more: Int32
    counter: Int32
    meets: Int32
    last: Int32


def part_of_chunk(cut, share, place, tile, room):
    """The part that is one chunk of `place`, from `tile` on: chunks are merged in ascending order, whoever has them.

    A chunk belongs to the share that holds its last tile. The share with the first one, the opener, adds its others to
    that as they come, in one state; each chunk of a later share has a state, by its number. A share has room for `room`
    states of the one place that it opens and does not end.
    """
    chunk, chunks = chunk_at(place, tile), chunk_at(place, place.tiles - 1) + 1
    opener = owner_of(cut, place.start + chunk_left(place, 0) - 1)
    after = start_of(cut, opener + 1) - place.start
    opened = chunk_at(place, cutlass.min(after, place.tiles - 1))
    opened = Int32(cutlass.select_(after < place.tiles, opened, chunks))
    first = share == opener
    return Part(
        opener * room,
        opened - 1,
        Int32(1),
        chunks - opened + 1,
        Int32(cutlass.select_(first, 0, chunk - opened + 1)),
        Int32(cutlass.select_(first & (chunk > 0), 1, 0)),
        opener,
        Int32(cutlass.select_((opened < chunks) & ((share != opener) | (chunk == opened - 1)), 1, 0)),
        Int32(cutlass.select_((opened == chunks) & (chunk == chunks - 1), 1, 0)),
    )
