"""The flash_sm90 family on the GPU: its tiles, boxes and tickets at their edges, to equal bits whatever runs beside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

import pa_ops
from helpers.chosen import problem_of
from helpers.hopper import (
    FAMILY,
    MASKS,
    MIXED,
    OPERATORS,
    SIZES,
    instances_of,
    on_sm90,
    replays,
    same_on_streams,
    tickets,
)
from helpers.parity import Evidence, repeats
from helpers.problems import Call, Shape, paged, prefix_sums, sinks, varlen
from pa_ops.plan import packed_heads
from pa_ops.registry import current_capability
from pa_ops.spec import Tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def tile_of(call: Call) -> Tile:
    """The tile of the instance that serves a call."""
    return pa_ops.select(problem_of(call), backend=FAMILY).entry.spec.tile


def alone(call: Call, pairs: Sequence[tuple[int, int]], row: int) -> Call:
    """The call with one of its sequences, in memory of the same strides."""
    tensors, new = dict(call.tensors), pairs[row][0]
    first, first_key = (sum(pair[side] for pair in pairs[:row]) for side in (0, 1))
    tensors["q"] = tensors["q"][first : first + new]
    tensors["cu_seqlens_q"] = prefix_sums([new], tensors["q"].device)
    if "block_table" in tensors:
        tensors |= {name: tensors[name][row : row + 1] for name in ("seqlens_k", "block_table")}
    else:
        tensors |= {name: tensors[name][first_key : first_key + pairs[row][1]] for name in ("k", "v")}
        tensors["cu_seqlens_k"] = prefix_sums([pairs[row][1]], tensors["q"].device)
    return Call(call.op, tensors, new, call.options)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", MASKS)
def test_C22_two_runs_are_bit_equal(operator: str, mask: str, dtype: torch.dtype, device: torch.device) -> None:
    for sizes in SIZES.values():
        call = OPERATORS[operator](MIXED * 3, Shape(**sizes, dtype=dtype), device, backend=FAMILY, **MASKS[mask])
        repeats(call.run, call.rows, sizes)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", MASKS)
def test_X12_a_sequence_alone_has_the_bits_it_has_in_a_batch(
    operator: str, mask: str, scale: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """None has keys enough for parts: test_parts.py has those. A scale of 1 makes maxima grow from block to block, also
    those of the next sequence's rows in a tile."""
    pairs = MIXED * 4
    options = {**MASKS[mask], "softmax_scale": scale, "backend": FAMILY}
    for sizes in SIZES.values():
        call = OPERATORS[operator](pairs, Shape(**sizes, dtype=dtype), device, **options)
        out, lse = call.run()
        first = 0
        for row, (new, _) in enumerate(pairs):
            if new:
                mine, my_lse = alone(call, pairs, row).run()
                assert torch.equal(mine, out[first : first + new]), (sizes, row)
                assert torch.equal(my_lse, lse[:, first : first + new]), (sizes, row)
            first += new


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_E1_windows_around_the_edges_of_tiles(
    operator: str, sizes: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(**SIZES[sizes], kv_heads=1, group=2, dtype=dtype)
    tile = tile_of(OPERATORS[operator]([(1, 1)], shape, device, sliding_window=1))
    edges = sorted({edge + more for edge in (tile.m, tile.n, 2 * tile.n) for more in (-1, 0, 1)} | {1, 2, 15, 17})
    lengths = (tile.n - 1, tile.n, tile.n + 1, 3 * tile.n, tile.m + tile.n + 1)
    pairs = [(new, kv) for kv in lengths for new in (1, 2, tile.m - 1, tile.m + 1) if new <= kv]
    for window in edges:
        call = OPERATORS[operator](pairs, shape, device, seed=window, sliding_window=window)
        on_sm90(call, evidence, f"window {window}, tile {tile}")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_D6_lengths_around_the_edges_of_tiles(
    operator: str, sizes: str, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(**SIZES[sizes], kv_heads=1, group=2, dtype=torch.bfloat16)
    for (mask, options), softcap in product(MASKS.items(), (0.0, 20.0)):
        for entry in instances_of(OPERATORS[operator]([(1, 1)], shape, device, **options)):
            tile = entry.spec.tile
            rows = [size + more for size in (64, tile.m, 2 * tile.m) for more in (-1, 0, 1)]
            keys = [size + more for size in (tile.n, 2 * tile.n, 4 * tile.n) for more in (-1, 0, 1)]
            extra = {**options, "softcap": softcap, "sinks": sinks(shape, device) if softcap else None}
            call = OPERATORS[operator]([*product(rows, keys), (1, 0), (0, 9)], shape, device, **extra)
            on_sm90(call, evidence, f"{mask}, softcap {softcap}, tile {tile}")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16, 64, 128])
@pytest.mark.parametrize("operator", OPERATORS)
def test_D6_X8_rows_of_heads_side_by_side_around_the_edges_of_tiles(
    operator: str, group: int, device: torch.device, evidence: Evidence
) -> None:
    """Sinks tell heads apart, positions tokens."""
    for sizes, (mask, options) in product(SIZES.values(), MASKS.items()):
        shape = Shape(**sizes, kv_heads=2, group=group, dtype=torch.bfloat16)
        for entry in instances_of(OPERATORS[operator]([(1, 1)], shape, device, **options)):
            tile = entry.spec.tile
            packed = packed_heads(entry.spec, group)
            rows = {max(size // packed + more, 1) for size in (64, tile.m) for more in (-1, 0, 1)}
            pairs = [(new, new + more) for new in sorted(rows) for more in (-1, 0, tile.n + 1)]
            call = OPERATORS[operator]([*pairs, (0, 9)], shape, device, sinks=sinks(shape, device), **options)
            on_sm90(call, evidence, f"groups of {group}, {mask}, tile {tile}")


@pytest.mark.parametrize("head_dims", [(128, 64), (64, 128), (40, 136), (72, 96), (96, 40), (160, 72)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_D6_values_of_another_head_size(
    operator: str, head_dims: tuple[int, int], dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    """By kernels of larger sizes: tests over SIZES have the one whose own sizes differ."""
    head_dim, head_dim_v = head_dims
    shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype, head_dim_v=head_dim_v)
    for (mask, options), softcap in product(MASKS.items(), (0.0, 20.0)):
        extra = {**options, "softcap": softcap, "sinks": sinks(shape, device) if softcap else None}
        call = OPERATORS[operator](MIXED * 3, shape, device, **extra)
        on_sm90(call, evidence, f"head sizes {head_dims}, {mask}, softcap {softcap}")


def test_B10_B12_batches_of_0_1_and_300_sequences(device: torch.device, evidence: Evidence) -> None:
    shape = Shape(64, kv_heads=1, group=4)
    for operator, batch in product(OPERATORS.values(), (1, 2, 31, 33, 300)):
        pairs = [((7 * row) % 5 * (row % 60), (13 * row * row) % 600) for row in range(1, batch + 1)]
        on_sm90(operator(pairs, shape, device), evidence, f"{batch} sequences")
    for operator in OPERATORS.values():
        on_sm90(operator([(0, 40)] * 5, shape, device), evidence, "sequences without tokens")
        call = operator([], shape, device, backend=FAMILY)
        call.tensors["q"] = call.tensors["q"][:0]
        out, lse = call.run()
        assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0)) and not any(tickets())


def test_tickets_run_out_around_the_number_of_blocks(device: torch.device, evidence: Evidence) -> None:
    blocks = current_capability().num_sms
    shape = Shape(64, kv_heads=1, group=1)
    edges = (full + more for full in (blocks // 2, blocks, 2 * blocks) for more in (-1, 0, 1))
    for tiles in (1, 2, *edges, 5 * blocks):
        on_sm90(paged([(1, 9)] * tiles, shape, device), evidence, f"{tiles} tiles of one row")
        on_sm90(varlen([(1, 300), *[(0, 5)] * tiles, (400, 400)], shape, device), evidence, f"{tiles} empty sequences")


def test_X6_graph_replay_with_lengths_that_change_on_the_device(dtype: torch.dtype, device: torch.device) -> None:
    call = paged([(250, 600)] * 4, Shape(128, dtype=dtype), device, backend=FAMILY)
    replays(
        call,
        (
            ((250, 250, 250, 250), (600, 600, 600, 600)),
            ((1, 0, 600, 3), (1, 600, 600, 0)),
            ((0, 0, 0, 0), (5, 5, 5, 5)),
            ((1000, 0, 0, 0), (600, 0, 0, 0)),
            ((64, 129, 1, 65), (64, 300, 600, 113)),
        ),
    )


def test_streams_have_tickets_of_their_own(device: torch.device) -> None:
    calls = [paged(MIXED * 4, Shape(128), device, seed=seed, backend=FAMILY) for seed in range(3)]
    same_on_streams(calls)
