"""Blocks of flash_sm90 that share keys, by twos and by eights: what each computes by itself, to the bit, whatever they
leave out and whichever of two grids has a tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pa_ops
from helpers import hopper
from helpers.hopper import MIXED, OPERATORS, SIZES, checked, instances_of, replays, same_on_streams
from helpers.parity import Evidence, expected, repeats
from helpers.problems import Call, Shape, paged, sinks, varlen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

MASKS = {name: options for name, options in hopper.MASKS.items() if "sliding_window" not in options}
# With eleven tiles of 1024 rows and more, of which pairs have some: quarters of them, with rows and without.
LONG = [*MIXED, (385, 1000), (767, 769), (64, 641), (0, 9), (400, 0), (1300, 700)]
# Eleven tiles of eight blocks, the last of them the pairs', as small as can be: with rows in two quarters, and in one.
ELEVEN = {"two quarters": [(1, 20)] * 10 + [(300, 90)], "one quarter": [(1, 20)] * 10 + [(30, 300)]}


def shared_and_alone(call: Call) -> Iterator[tuple[str, str]]:
    """The kernels for calls like this whose blocks share keys, each with that of blocks by themselves and its tile."""
    specs = [entry.spec for entry in instances_of(call)]
    alone = {spec.tile: spec.name for spec in specs if spec.head_dim_v == specs[0].head_dim_v}
    found = [(name, alone[tile.alone]) for tile, name in alone.items() if tile.cluster > 1]
    assert found
    yield from found


@pytest.mark.parametrize("group", [1, 4, 6])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_X12_blocks_that_share_keys_have_the_bits_of_those_that_do_not(
    operator: str, mask: str, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    """No sequence has keys enough for parts, of which clusters have other numbers."""
    for sizes in SIZES.values():
        shape = Shape(**sizes, kv_heads=2, group=group, dtype=dtype)
        call = OPERATORS[operator](LONG, shape, device, **MASKS[mask], sinks=sinks(shape, device))
        for instances in shared_and_alone(call):
            shared, alone = (call.with_options(backend=name) for name in instances)
            (out, lse), (other, other_lse) = shared.run(), alone.run()
            assert torch.equal(out[: call.rows], other[: call.rows]), instances
            assert torch.equal(lse[:, : call.rows], other_lse[:, : call.rows]), instances


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_C22_two_runs_of_blocks_that_share_keys_are_bit_equal(
    operator: str, mask: str, dtype: torch.dtype, device: torch.device
) -> None:
    """In parts, too: a cluster's tiles are few."""
    for sizes in SIZES.values():
        call = OPERATORS[operator]([(700, 6000), (1, 3000), *LONG], Shape(**sizes, dtype=dtype), device, **MASKS[mask])
        for shared, _ in shared_and_alone(call):
            repeats(call.with_options(backend=shared).run, call.rows, shared)


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 80, 128, 256])
def test_D1_pages_of_any_size_in_shares_of_tiles(page_size: int, device: torch.device, evidence: Evidence) -> None:
    """Some that a tile divides, whose boxes are shares of it, some by odd numbers of boxes, and some are missing."""
    for sizes in SIZES.values():
        for mask, options in MASKS.items():
            call = paged(LONG, Shape(**sizes, page_size=page_size), device, **options)
            call.tensors["block_table"][::2, ::3] = -1
            want = expected(call)
            for shared, _ in shared_and_alone(call):
                checked(call, shared, evidence, f"{mask}, pages of {page_size}", want)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_X6_a_captured_graph_of_blocks_that_share_keys(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    call = paged([(250, 9000)] * 4, Shape(head_dim, dtype=dtype), device, causal=head_dim < 256)
    for shared, _ in shared_and_alone(call):
        replays(
            call.with_options(backend=shared),
            (
                ((250, 250, 250, 250), (9000, 9000, 9000, 9000)),
                ((1, 0, 60, 3), (1, 600, 9000, 0)),
                ((0, 0, 0, 0), (5, 5, 5, 9000)),
                ((1000, 0, 0, 0), (8000, 0, 0, 0)),
                ((193, 385, 1, 0), (193, 300, 600, 113)),
            ),
        )


def test_C22_two_grids_of_a_call_beside_those_of_others(dtype: torch.dtype, device: torch.device) -> None:
    """Eights that wait for SMs while another stream's pairs have some, and the other way round."""
    shape = Shape(256, kv_heads=4, group=2, dtype=dtype)
    calls = [
        varlen(pairs, shape, device, causal=False) for pairs in (LONG, [(3000, 3000)], [(1, 1)], ELEVEN["one quarter"])
    ]
    same_on_streams([call.with_options(backend=name) for call in calls for name, _ in shared_and_alone(call)])


@pytest.mark.parametrize("pairs", [[(1000, 2500)], [(700, 300), (1000, 2500)], [(1000, 190)]], ids=str)
def test_D6_a_last_round_of_one_sequence_in_stretches(
    pairs: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    """12 and 8 tiles for an H200's 15 clusters of eight, and some too short for their parts."""
    call = varlen(pairs, Shape(256, kv_heads=29, group=1, dtype=dtype), device, causal=False)
    want = expected(call)
    for shared, _ in shared_and_alone(call):
        checked(call, shared, evidence, f"{pairs}", want)
        repeats(call.with_options(backend=shared).run, call.rows, shared)


def test_long_sequences_are_given_to_blocks_that_share_keys(device: torch.device, evidence: Evidence) -> None:
    mixed = [(2048, 2048), *[(1, 3000)] * 3]
    for head_dim, causal, pairs, clusters in (
        (128, True, [(2048, 2048)] * 2, ["c2"]),
        (128, True, mixed, []),
        (256, True, [(2048, 2048)] * 2, ["c2"]),
        (256, False, [(4096, 4096)] * 2, ["c8", "c2"]),
    ):
        call = paged(pairs, Shape(head_dim, kv_heads=1, group=4), device, causal=causal)
        with pa_ops.trace.recording() as calls:
            call.run()
        assert [made.instance[-2:] for made in calls if made.instance[-2] == "c"] == clusters, (head_dim, causal, pairs)


def test_sanitizer_sample_of_blocks_that_share_keys(device: torch.device, evidence: Evidence) -> None:
    """Small enough for compute-sanitizer: a second block with rows and one without, and keys in parts."""
    for pairs in ([(140, 300), (1, 40), (0, 3)], [(30, 3000)]):
        call = paged(pairs, Shape(64, kv_heads=1, group=4), device)
        for shared, _ in shared_and_alone(call):
            checked(call, shared, evidence, f"{pairs}", expected(call))


@pytest.mark.parametrize("quarters", ELEVEN)
def test_sanitizer_sample_of_eight_blocks_beside_pairs(quarters: str, device: torch.device, evidence: Evidence) -> None:
    call = varlen(ELEVEN[quarters], Shape(256, kv_heads=1, group=1), device, causal=False)
    for shared, _ in shared_and_alone(call):
        checked(call, shared, evidence, quarters, expected(call))
