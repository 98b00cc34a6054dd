"""Batch invariance of the decode family on the GPU: a sequence has the same bits whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.parity import Evidence, check
from helpers.problems import Call, Shape, paged, prefix_sums, sinks
from helpers.rooms import as_it_began, poison
from pa_ops.arguments import CHUNK_KEYS

pytestmark = pytest.mark.gpu

# (new, keys): nothing, one tile, around one chunk, around the length at which chunks of head size 128 double, long.
SEVEN = (
    (1, 5000),
    (1, CHUNK_KEYS),
    (3, CHUNK_KEYS + 1),
    (0, 700),
    (2, 32 * CHUNK_KEYS),
    (4, 32 * CHUNK_KEYS + 1),
    (1, 1),
)
OTHERS = ((1, 100_000), (4, 63), (0, 0), (1, 0), (2, 9000), (3, 3), (1, 2048), (4, 40_000))
OPTIONS = ({}, {"sliding_window": 3000}, {"sliding_window": 700, "softcap": 20.0})


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    """Every call of this file is one under batch invariance."""
    with pa_ops.batch_invariant():
        yield


def rows_of(call: Call, row: int) -> slice:
    """The query rows of a sequence."""
    first, stop = call.tensors["cu_seqlens_q"][row : row + 2].tolist()
    return slice(first, stop)


def chosen(call: Call, rows: Sequence[int]) -> Call:
    """A batch of these sequences of the call, in this order."""
    tensors, device = dict(call.tensors), call.tensors["q"].device
    slices = [rows_of(call, row) for row in rows]
    tensors["q"] = torch.cat([call.tensors["q"][where] for where in slices])
    tensors["cu_seqlens_q"] = prefix_sums([where.stop - where.start for where in slices], device)
    for name in ("seqlens_k", "block_table"):
        tensors[name] = call.tensors[name][list(rows)]
    return Call(call.op, tensors, tensors["q"].shape[0], call.options)


def bits(call: Call, row: int, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What a call gave for one of its sequences."""
    where = rows_of(call, row)
    return results[0][where].clone(), results[1][:, where].clone()


def on_decode(call: Call) -> tuple[Tensor, Tensor]:
    """Runs a call that the decode family serves alone."""
    found = call.run(backend="decode")
    last = pa_ops.trace.last()
    assert last is not None and last.family == "decode"
    return found


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], what: object) -> None:
    """Asserts equal bits of out and lse."""
    assert torch.equal(found[0], wanted[0]), f"out, {what}"
    assert torch.equal(found[1], wanted[1]), f"lse, {what}"


@pytest.mark.parametrize("options", OPTIONS, ids=("causal", "window", "narrow"))
@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
def test_X12_bits_alone_in_seven_and_in_sixty_four(
    head_dim: int, options: dict[str, float], dtype: torch.dtype, device: torch.device
) -> None:
    shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype)
    more = {**options, "sinks": sinks(shape, device)} if "softcap" in options else options
    whole = paged([*SEVEN, *OTHERS], shape, device, **more)
    mine = range(len(SEVEN))
    alone = [on_decode(chosen(whole, [row])) for row in mine]
    seven = chosen(whole, mine)
    backwards = chosen(whole, [*mine][::-1])
    crowd = [7 + (5 * place) % len(OTHERS) for place in range(64 - len(SEVEN))]
    batches = {"seven": (seven, {row: row for row in mine}), "reversed": (backwards, {row: 6 - row for row in mine})}
    for first in (0, 20, len(crowd)):  # where the seven stand in the crowd
        many = chosen(whole, [*crowd[:first], *mine, *crowd[first:]])
        batches[f"64, from {first}"] = many, {row: first + row for row in mine}
    for what, (batch, places) in batches.items():
        results = on_decode(batch)
        for row, place in places.items():
            same(bits(batch, place, results), alone[row], (what, SEVEN[row]))
        assert as_it_began(device)


def test_X12_bounds_room_and_padding_do_not_show(dtype: torch.dtype, device: torch.device) -> None:
    call = chosen(paged(SEVEN, Shape(128, kv_heads=2, group=4, dtype=dtype), device), range(len(SEVEN)))
    plain = call.run()
    for max_q, max_k in ((4, 32 * CHUNK_KEYS + 1), (100, 1 << 20), (None, 1 << 17), (1 << 12, None)):
        found = call.with_options(max_seqlen_q=max_q, max_seqlen_k=max_k).run()
        same(found, plain, (max_q, max_k))
    padded = dict(call.tensors)
    padded["q"] = torch.cat([padded["q"], torch.full_like(padded["q"], torch.nan)])
    padded["block_table"] = torch.cat([padded["block_table"], torch.full_like(padded["block_table"], -1)], 1)
    out, lse = Call(call.op, padded, call.rows, call.options).run()
    same((out[: call.rows], lse[:, : call.rows]), plain, "padded")


@pytest.mark.parametrize("window", (0, 3000))
def test_X12_page_ids_do_not_show(window: int, device: torch.device) -> None:
    call = paged(SEVEN, Shape(128, kv_heads=2, group=4), device, sliding_window=window)
    plain = on_decode(call)
    pages = call.tensors["k_cache"].shape[0]
    order = torch.randperm(pages, device=device)
    moved = dict(call.tensors)
    for name in ("k_cache", "v_cache"):
        moved[name] = torch.empty_like(call.tensors[name])
        moved[name][order] = call.tensors[name]
    table = call.tensors["block_table"]
    there = (table >= 0) & (table < pages)
    moved["block_table"] = torch.where(there, order[table.clamp(0, pages - 1).long()].int(), table)
    found = on_decode(Call(call.op, moved, call.rows, call.options))
    rows = call.rows
    same((found[0][:rows], found[1][:, :rows]), (plain[0][:rows], plain[1][:, :rows]), "moved")


def test_X12_a_sequence_has_the_kernel_of_its_own_rows(dtype: torch.dtype, device: torch.device) -> None:
    """16 / G new tokens are decode's, more are not: alone, beside others, and where a plan is met again."""
    shape = Shape(128, kv_heads=2, group=4, dtype=dtype)
    whole = paged([(1, 900), (4, 2000), (5, 2000), (7, 7), (200, 3000), (1, 4000)], shape, device)
    for bound in (None, 200):
        alone = [chosen(whole, [row]).with_options(max_seqlen_q=bound).run() for row in range(6)]
        for rows in ([0, 1, 5], [0, 2, 5], [3, 1, 4, 0], [2, 3], [0, 1, 2, 3, 4, 5]):
            batch = chosen(whole, rows)
            results = batch.run()
            for place, row in enumerate(rows):
                same(bits(batch, place, results), alone[row], (rows, row))


@pytest.mark.parametrize("head_dim", (64, 80, 96, 128, 192, 256))
def test_X12_results_are_right(head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    """From a workspace of NaN, by one chunk, by some, by as many as a block has room for."""
    poison(device)
    shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype)
    for window, softcap in product((0, 1200), (0.0, 20.0)):
        pairs = [*SEVEN[:4], (1, 1600), (2, 2600), (4, 8200), (4, 4096), (1, 0), (1, 20_000)]
        extra = {"sliding_window": window, "softcap": softcap, "sinks": sinks(shape, device) if softcap else None}
        call = paged(pairs, shape, device, **extra)
        check(call.with_options(backend="decode"), evidence, f"window {window}, softcap {softcap}")


def test_X12_a_captured_graph_replays_other_lengths(device: torch.device) -> None:
    """A batch whose lengths change between replays has, each time, the bits of a fresh call."""
    call = chosen(paged(SEVEN, Shape(128, kv_heads=2, group=4), device), range(len(SEVEN)))
    out, lse = call.poisoned_results()
    call.with_options(backend="decode").run_into(out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.with_options(backend="decode").run_into(out, lse)
    lengths = call.tensors["seqlens_k"].clone()
    for keys in (lengths, (lengths + 1) // 2, lengths):  # no more than were there: other slots are NaN
        call.tensors["seqlens_k"].copy_(keys)
        graph.replay()
        torch.cuda.synchronize()
        same((out.clone(), lse.clone()), on_decode(call), "replay")


def test_sanitizer_sample_of_fixed_chunks(device: torch.device, evidence: Evidence) -> None:
    """Small enough for compute-sanitizer: one chunk, some by one block, some by two and more, doubled ones."""
    shape = Shape(64, kv_heads=1, group=4)
    pairs = [(1, CHUNK_KEYS), (2, 5 * CHUNK_KEYS + 3), (0, 40), (1, 65 * CHUNK_KEYS), (4, 3000), (1, 0)]
    for window in (0, 2000):
        check(paged(pairs, shape, device, sliding_window=window, backend="decode"), evidence, f"window {window}")
