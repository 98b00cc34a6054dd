"""Turns eligible rows and the sizes of a problem into the one that runs: the fastest recorded, or the cheapest.

Sizes and times order rows here and nowhere else, and never remove one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pa_ops.capability import Capability
from pa_ops.manifest import Entry
from pa_ops.plan import ceil_div, packed_heads
from pa_ops.problem import Problem
from pa_ops.spec import Family, InstanceSpec, Layout, Word
from pa_ops.timings import ShapeClass, Timing, of_card

# Query rows whose mathematics takes as long as bringing one K/V tile in: what a small tile saves in padding it pays
# again in loads. An estimate; it ranks tiles of one head size.
LOAD_ROWS = 64
# Keys from which on a tile of more tokens pays (docs/performance.md): on sequences of 512 tokens it is 20% slower, on
# 1024 5%; on 2048 3 to 5% faster, on 8192 10%. With a window of 1024 it is 11% slower.
SMALL_TOKENS = 128
LONG_KEYS = 2048
# Tiles of a cluster's blocks in the mean sequence, from which on it pays that they share keys: by half a tile each that
# sequences leave empty, a taller one loses 3% then, as much as is gained (docs/performance.md).
CLUSTER_TILES = 16
MANY_TOKENS = 1 << 20  # every SM has many tiles of them, of whatever height

DECODE_ROWS = 16  # of a decode tile; beyond so many, one of 64 or 128 query rows is better filled than two
MIXED_TOKENS = 1024
# Attention families, the best first, where the longest sequence has few query rows and where it has more; wgmma does
# about twice the work of mma.sync on an H200. The mea ones are for SMs that the others do not reach: there, by an
# override, or for what no other takes.
FOR_FEW_ROWS = (Family.DECODE, Family.FLASH_SM90, Family.FLASH_SM80, Family.MEA_DECODE, Family.MEA)
FOR_MANY_ROWS = (Family.FLASH_SM90, Family.FLASH_SM80, Family.MEA, Family.DECODE, Family.MEA_DECODE)
SPLITTING = frozenset({Family.DECODE, Family.MEA_DECODE})  # blocks share the keys out; made for few query rows

BESIDE = frozenset({Family.FLASH_SM90})  # blocks take tiles as they come: they begin on SMs that decode leaves them
# Of a batch, heads of a group included: decode counts their blocks times tiles of keys in 32 bits.
BESIDE_ROWS = 1 << 18

TIE = 0.1  # of recorded times: two runs of one kernel differ by up to 5%, on two machines by more

Cost = tuple[int, int, int, int, bool, int, int, str]


def mean_rows(problem: Problem) -> int:
    """New tokens of the mean sequence."""
    return ceil_div(problem.tokens, max(problem.batch, 1))


def query_rows(problem: Problem) -> int:
    """New tokens of the longest sequence as far as the host knows: its bound, else the mean."""
    return mean_rows(problem) if problem.max_q is None else problem.max_q


def power_of_two(size: int) -> int:
    """The largest one up to `size`; 0 of 0."""
    return 1 << size.bit_length() >> 1


def likely_keys(problem: Problem) -> int:
    """Keys of a long sequence as far as the host knows, to the power of two, as choices are kept (registry.size_class).

    Where no bound tells, there are as many as query rows, and in a cache twice as many.
    """
    if problem.max_k is not None:
        return power_of_two(problem.max_k)
    if problem.max_q is not None:
        rows = power_of_two(problem.max_q)
    else:
        rows = 1 << max(problem.tokens.bit_length() - problem.batch.bit_length(), 0)
    return 2 * rows if problem.layout is Layout.GATHER else rows


def few_rows(problem: Problem) -> bool:
    """Whether the longest sequence is likely to have so few query rows, heads of a group included, that one tile of a
    splitting family holds them."""
    return query_rows(problem) * problem.group <= DECODE_ROWS


def ranks(problem: Problem) -> dict[Family, int]:
    """The place of each family among those that may serve `problem`; the only one of its operator is not there."""
    order = FOR_FEW_ROWS if few_rows(problem) else FOR_MANY_ROWS
    return {family: place for place, family in enumerate(order)}


def extremes(problem: Problem) -> tuple[Problem, Problem]:
    """The same facts with as few query rows as can be, and with more than any tile of a splitting family holds."""
    few = replace(problem, batch=1, tokens=1, max_q=None)
    return few, replace(few, tokens=DECODE_ROWS + 1)


def prolonged(problem: Problem) -> Problem:
    """The same facts with one sequence so long that no tile is too tall for it."""
    return replace(problem, batch=1, tokens=MANY_TOKENS, max_q=None, max_k=None)


def sharing(spec: InstanceSpec, problem: Problem) -> int:
    """The place of a tile by how many blocks share its keys: the more of them the better where it pays, and the worse
    where it does not.

    It pays in long sequences, if none has so few query rows that decode may have it, beside which blocks start one by
    one.
    """
    cluster, mean = spec.tile.cluster, mean_rows(problem)
    if cluster == 1:
        return 0
    least = CLUSTER_TILES * cluster * spec.tile.m
    long = mean * packed_heads(spec, problem.group) >= least and likely_keys(problem) >= LONG_KEYS
    return -cluster if long and mean > MIXED_TOKENS else cluster


class Division(Word):
    """How the sequences of a paged batch are shared out between kernels, by what the host knows."""

    DECODE = "decode"
    PREFILL = "prefill"
    BOTH = "both"


def division(problem: Problem, rows: int) -> Division:
    """Which kernels a batch needs where few query rows have a kernel of their own, with `rows` rows a tile.

    Sequences of at most rows / G tokens are its. Where the host cannot tell whether there are others, both kernels
    are launched and share the sequences out on the device; the one without work costs 3 us. Beyond 1024 tokens a
    sequence on average that is no longer worth it. With no more tokens than sequences it is a decode step, or nearly:
    a longer sequence among them takes several tiles of few rows, which costs time and nothing else.
    """
    few = rows // problem.group
    if few == 0 or (problem.batch == 1 and problem.tokens > few):
        return Division.PREFILL
    if problem.tokens <= max(few, problem.batch) or (problem.max_q is not None and problem.max_q <= few):
        return Division.DECODE
    return Division.BOTH if mean_rows(problem) <= MIXED_TOKENS else Division.PREFILL


def certain_division(problem: Problem, rows: int) -> Division:
    """`division` where a sequence's kernel must follow from its own rows: whatever the host does not know for certain,
    of this batch and of all that its plan may serve, is left to the device.

    A plan holds for as many tokens and as large a bound as have the same power of two.
    """
    few, most = rows // problem.group, 2 * problem.tokens - 1
    if problem.max_q is not None:
        most = min(most, 2 * power_of_two(problem.max_q) - 1)
    if few == 0:
        return Division.PREFILL
    return Division.DECODE if most <= few else Division.BOTH


def runs_beside(problem: Problem, prefill: Family) -> bool:
    """Whether the kernel for the others runs at the same time as the one for few query rows, where a batch needs both.

    A plan holds for as many tokens as have the same power of two. Five tokens may be a block of work: with so many rows
    a count stays within 32 bits where every sequence has 2.6 million keys, and with longer ones the more.
    """
    return prefill in BESIDE and (2 * problem.tokens - 1) * problem.group < BESIDE_ROWS


def timing(entry: Entry, problem: Problem, capability: Capability) -> Timing | None:
    """What a call like `problem` took on a card of that name, None where nobody has recorded it of that very code: what
    is translated from another SM's may take ten times as long."""
    shape_class = ShapeClass.FEW if few_rows(problem) else ShapeClass.MANY
    return of_card(capability.card).get((entry.name, entry.target, shape_class))


def leaders(able: Iterable[Entry], problem: Problem, capability: Capability) -> dict[Family, Entry]:
    """The row that each family would serve `problem` with, by `cost`; the cheapest family first."""
    firsts: dict[Family, Entry] = {}
    for entry in sorted(able, key=cost(problem, capability)):
        firsts.setdefault(entry.spec.family, entry)
    return firsts


def cheapest(able: Sequence[Entry], problem: Problem, capability: Capability) -> Entry:
    """The row that runs of those that may, at least one: the fastest by the card's times, or the first by `cost`.

    Times decide between families, each by its first row by cost: one shape a class cannot tell which of a family's head
    sizes serves a smaller one best, and the choice between them must not hang on a few microseconds of noise. Times
    decide only where the row that comes first has one: a kernel that nobody has timed yet is not passed over for those
    that somebody has. Those within TIE of the fastest are as fast, and the cheapest of them runs.
    """
    firsts = leaders(able, problem, capability)
    times = {family: timing(entry, problem, capability) for family, entry in firsts.items()}
    known = {family: found.microseconds for family, found in times.items() if found is not None}
    chosen = next(iter(firsts))
    if chosen in known:
        limit = (1 + TIE) * min(known.values())
        chosen = next(family for family in firsts if known.get(family, math.inf) <= limit)
    return firsts[chosen]


def cost(problem: Problem, capability: Capability) -> Callable[[Entry], Cost]:
    """The place of a row in a total order: family, padded head sizes, native or not, blocks that share keys where that
    pays, too tall a tile, busiest SM.

    The family for as many rows comes first, however much it pads. Padding comes early because it costs shared memory
    and registers as well as work. Code of the device's own target comes before what is translated for it: its tile was
    chosen there. The name decides what is left, so that the order of the rows carries no meaning.
    """
    order = ranks(problem)
    short = problem.window or likely_keys(problem) < LONG_KEYS
    rows, tallest = query_rows(problem), SMALL_TOKENS if short else math.inf
    heads, places = problem.batch * problem.num_heads, capability.places

    def of(entry: Entry) -> Cost:
        spec = entry.spec
        tile_m = max(spec.tile.m, 1)
        packed = packed_heads(spec, problem.group)
        tiles = heads // packed * ceil_div(rows * packed, tile_m)
        slots = ceil_div(tiles, capability.num_sms) * (tile_m + LOAD_ROWS)
        native = min(places.get(target, len(places)) for target in entry.code_targets)
        padded = spec.head_dim + spec.head_dim_v
        return (
            order.get(spec.family, 0),
            padded,
            native,
            sharing(spec, problem),
            spec.tile.m > tallest * packed,
            slots,
            entry.smem_bytes,
            entry.name,
        )

    return of
