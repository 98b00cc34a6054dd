"""How decode cuts a batch: templates/device/cuts.py and quotients.py themselves, with plain numbers for the DSL's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.tiles import DECODE_TILES
from helpers import plain
from pa_ops.arguments import CHUNK_KEYS, STATES_A_BLOCK, UNCUT, WIDEST_STATE, most_chunks
from pa_ops.launch import factor_of

ROWS = 16
quotients = SimpleNamespace(**plain.run("quotients", {}))
cuts = SimpleNamespace(**plain.run("cuts", {"quotients": vars(quotients)}))


class Span(NamedTuple):
    """One sequence as shares.py spans it: the number of its first tile, its tiles, its heads times row blocks."""

    first: int
    tiles: int
    places: int


def spread(more: int, blocks: int) -> int:
    """As shares.py has it."""
    return -(-(more << cuts.SPREAD_BITS) // blocks)


class Batch(NamedTuple):
    """Sequences, the blocks of the grid, and what the instance says of chunks."""

    sequences: tuple[Span, ...]
    grid: int
    least: int
    most: int

    def cut(self) -> tuple[int, int, int, int]:
        """The rule of shares.py."""
        total = sum(s.tiles * s.places for s in self.sequences)
        places = sum(s.places for s in self.sequences)
        blocks = max(min(self.grid, max(places, total // 4)), 1)
        if len({s.tiles for s in self.sequences if s.places}) == 1:
            blocks = cuts.even(total, places, blocks)
        return total, blocks, total // blocks, spread(total % blocks, blocks)

    def places(self) -> Iterator[Any]:
        """All of them, in the row's order."""
        start = 0
        for s in self.sequences:
            for _ in range(s.places):
                yield cuts.Place(start, s.first, s.tiles, cuts.chunk_bits(self.least, s.tiles, self.most))
                start += s.tiles


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any lengths, windows, grids and instances."""
    head_dim = draw(st.sampled_from(sorted(DECODE_TILES)))
    least = (CHUNK_KEYS // DECODE_TILES[head_dim].n).bit_length() - 1
    lengths = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.sampled_from((256, 257, 2048, 2049)))
    sequence = st.builds(Span, st.integers(0, 5000), lengths, st.integers(0, 9))
    sequences = draw(st.lists(sequence, min_size=1, max_size=12))
    return Batch(tuple(sequences), draw(st.integers(1, 300)), least, most_chunks(head_dim))


def chunks_of(place: Any) -> list[tuple[int, int]]:
    """[begin, end) of every chunk of a place, walked as a block walks them."""
    found, tile = [], 0
    while tile < place.tiles:
        end = tile + cuts.chunk_left(place, tile)
        found.append((tile, end))
        tile = end
    return found


@given(batches())
def test_X12_chunks_follow_from_a_sequence_alone_and_begin_at_fixed_keys(batch: Batch) -> None:
    for place in batch.places():
        chunks, size = chunks_of(place), 1 << place.bits
        assert chunks[0][0] == 0 and chunks[-1][1] == place.tiles
        assert all((place.first + begin) % size == 0 for begin, _ in chunks[1:])
        assert len(chunks) <= (1 << batch.most) + (place.first % size > 0)
        assert place.bits == batch.least or place.tiles > 1 << (place.bits - 1 + batch.most), "no longer than need be"
        for number, (begin, end) in enumerate(chunks):
            for tile in {begin, (begin + end) // 2, end - 1}:
                assert cuts.chunk_at(place, tile) == number and cuts.chunk_begin(place, tile) == begin
                assert cuts.chunk_left(place, tile) == end - tile


@given(batches())
def test_X12_every_chunk_is_computed_once_and_merged_in_ascending_order(batch: Batch) -> None:
    """The steps of shares.py, decode.py and states.py, by every block; states hold the chunks that they sum."""
    cut, room = batch.cut(), (1 << batch.most) + 1
    places = list(batch.places())
    states: dict[int, list[int]] = {}
    arrived: dict[int, int] = {}
    finished: dict[int, list[int]] = {}
    waiting: list[tuple[Any, Any]] = []
    for share in range(batch.grid):
        begin, end = (_between(places, unit, cut[0]) for unit in cuts.bounds(cut, share))
        for place in places:
            for low, high in chunks_of(place):
                if not begin <= place.start + low < end:
                    continue
                assert place.start + high <= end, "shares end between chunks"
                if high - low == place.tiles:
                    assert finished.setdefault(place.start, [0]) == [0]
                    continue
                part, chunk = cuts.part_of_chunk(cut, share, place, low, room), cuts.chunk_at(place, low)
                at = _state(part, part.mine)
                assert share <= part.counter or part.counter * room < at, "an opener's first state is its own"
                assert part.counter * room <= at < (part.counter + 1) * room
                states[at] = [*states[at], chunk] if part.more else [chunk]
                if part.meets:
                    arrived[part.counter] = arrived.get(part.counter, 0) + 1
                    if arrived[part.counter] == part.states:
                        waiting.append((place, part))
                elif part.last:
                    assert place.start not in finished
                    finished[place.start] = [c for i in range(part.states) for c in states[_state(part, i)]]
    for place, part in waiting:
        assert arrived.pop(part.counter) == part.states
        assert place.start not in finished
        finished[place.start] = [c for i in range(part.states) for c in states[_state(part, i)]]
    assert not arrived, "counters end at zero"
    assert finished == {place.start: [*range(len(chunks_of(place)))] for place in places}


def _between(places: Sequence[Any], unit: int, total: int) -> int:
    """`between_chunks` of shares.py."""
    if unit >= total:
        return unit
    place = next(place for place in places if place.start <= unit < place.start + place.tiles)
    return int(place.start + cuts.chunk_begin(place, unit - place.start))


def _state(part: Any, number: int) -> int:
    """`state` of states.py."""
    return int(part.base + (part.skip + number * part.step if number > 0 else 0))


@given(batches())
def test_shares_are_all_tiles_and_without_chunks_a_place_is_one(batch: Batch) -> None:
    cut = batch.cut()
    owners = [share for share in range(batch.grid) for _ in range(*cuts.bounds(cut, share))]
    assert owners == [cuts.owner_of(cut, tile) for tile in range(cut[0])]
    assert all(chunks_of(place) == [(0, place.tiles)] for place in batch._replace(least=UNCUT).places())


@given(batches())
def test_without_chunks_every_share_posts_what_it_has_of_one_row_that_another_opened(batch: Batch) -> None:
    """The steps of shares.py and decode.py; a block waits for shares after its own, whose blocks have lower numbers."""
    cut = batch.cut()
    sent, awaited = [], []
    for share in range(cut[1]):
        begin, end = cuts.bounds(cut, share)
        for place in batch.places():
            unit, stop = max(begin, place.start), min(end, place.start + place.tiles)
            if unit < stop and stop - unit < place.tiles and unit == place.start:
                awaited += range(share + 1, cuts.owner_of(cut, place.start + place.tiles - 1) + 1)
            elif unit < stop and stop - unit < place.tiles:
                sent.append(share)
    assert sorted(awaited) == sent == sorted(set(sent))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300))
def test_shares_of_places_of_one_length_end_where_places_do(places: int, tiles: int, blocks: int) -> None:
    """Or else all blocks have one: no more than one of 32 is left without, and none where shares are long."""
    total = places * tiles
    shares = cuts.even(total, places, blocks)
    assert 31 * blocks <= 32 * shares <= 32 * blocks
    assert shares == blocks or total < 256 * blocks
    if shares != blocks:
        cut = total, shares, total // shares, spread(total % shares, shares)
        begins = {cuts.start_of(cut, share) for share in range(shares)}
        ends = {place * tiles for place in range(places)}
        assert begins <= ends or ends <= begins


@pytest.mark.parametrize(
    ("places", "tiles", "blocks", "shares"),
    [
        (64 * 8, 16, 264, 256),  # two whole places a share
        (63 * 8, 64, 254, 252),
        (16 * 8, 128, 264, 256),  # half a place
        (8, 2048, 264, 264),  # 33 shares a place as it is
        (128 * 8, 128, 264, 264),  # too long
        (67 * 8, 16, 264, 264),  # too many would be without
        (1, 1, 1, 1),
        (0, 0, 1, 1),
    ],
)
def test_shares_of_places_of_one_length(places: int, tiles: int, blocks: int, shares: int) -> None:
    assert cuts.even(places * tiles, max(places, 1), blocks) == shares


@given(st.integers(1, 2047), st.data())
def test_the_owner_of_a_tile_holds_it(blocks: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(blocks, 2**31 - 1))  # there are no more blocks than tiles
    cut = (total, blocks, total // blocks, spread(total % blocks, blocks))
    assert [cuts.start_of(cut, share) for share in (0, blocks)] == [0, total]
    tile = data.draw(st.one_of(st.integers(0, total - 1), st.integers(max(0, total - 3), total - 1)))
    begin, end = cuts.bounds(cut, cuts.owner_of(cut, tile))
    assert begin <= tile < end


@given(st.integers(0, 2**31 - 1), st.one_of(st.integers(1, 300), st.integers(1, 2**31 - 1)))
def test_a_factor_divides_as_division_does(value: int, divisor: int) -> None:
    factor = factor_of(divisor) % 2**32  # the field is an int32
    assert quotients.by_factor(value, divisor, factor) == quotients.divided(value, divisor) == value // divisor


@pytest.mark.parametrize("head_dim", sorted(DECODE_TILES))
def test_E11_a_block_has_room_for_all_states_of_a_place(head_dim: int) -> None:
    room = STATES_A_BLOCK * WIDEST_STATE
    assert ((1 << most_chunks(head_dim)) + 1) * (head_dim + 2) <= room
    assert CHUNK_KEYS % DECODE_TILES[head_dim].n == 0 and DECODE_TILES[head_dim].m == ROWS


def test_X12_one_long_sequence_fills_the_card_and_a_short_one_is_not_cut() -> None:
    heads, blocks = 8, 264
    for keys, wanted in ((512, 1), (513, 2), (4096, 8), (16384, 32), (16385, 17), (131072, 32)):
        tile = DECODE_TILES[128]
        bits = cuts.chunk_bits((CHUNK_KEYS // tile.n).bit_length() - 1, -(-keys // tile.n), most_chunks(128))
        assert len(chunks_of(cuts.Place(0, 0, -(-keys // tile.n), bits))) == wanted
        assert wanted * heads <= blocks
