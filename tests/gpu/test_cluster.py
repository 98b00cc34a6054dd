"""Two blocks of flash_sm90 that share keys: what each computes by itself, to the bit, whatever they leave out."""

from __future__ import annotations

import pytest
import torch

import pa_ops
from helpers import hopper
from helpers.hopper import MIXED, OPERATORS, SIZES, checked, instances_of, replays
from helpers.parity import Evidence, expected, repeats
from helpers.problems import Call, Shape, paged, sinks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

MASKS = {name: options for name, options in hopper.MASKS.items() if "sliding_window" not in options}
LONG = [*MIXED, (385, 1000), (767, 769), (64, 641), (0, 9), (400, 0)]


def by_twos_and_alone(call: Call) -> tuple[str, str]:
    """The kernels of both kinds for calls like this, with the same tile."""
    specs = [entry.spec for entry in instances_of(call)]
    shared = next(spec for spec in specs if spec.tile.cluster == 2 and spec.head_dim_v == specs[0].head_dim_v)
    alone = next(spec for spec in specs if spec.tile == shared.tile.alone)
    return shared.name, alone.name


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
        shared, alone = (call.with_options(backend=name) for name in by_twos_and_alone(call))
        (out, lse), (other, other_lse) = shared.run(), alone.run()
        assert torch.equal(out[: call.rows], other[: call.rows]), sizes
        assert torch.equal(lse[:, : call.rows], other_lse[:, : call.rows]), sizes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_C22_two_runs_of_blocks_that_share_keys_are_bit_equal(
    operator: str, mask: str, dtype: torch.dtype, device: torch.device
) -> None:
    """In parts, too: a cluster's tiles are few."""
    for sizes in SIZES.values():
        call = OPERATORS[operator]([(700, 6000), (1, 3000), *LONG], Shape(**sizes, dtype=dtype), device, **MASKS[mask])
        shared, _ = by_twos_and_alone(call)
        repeats(call.with_options(backend=shared).run, call.rows, sizes)


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 80, 128, 256])
def test_D1_pages_of_any_size_in_halves_of_tiles(page_size: int, device: torch.device, evidence: Evidence) -> None:
    """Some that a tile divides, whose boxes are halves of it, some by odd numbers of boxes, and some are missing."""
    for sizes in SIZES.values():
        call = paged(LONG, Shape(**sizes, page_size=page_size), device)
        call.tensors["block_table"][::2, ::3] = -1
        checked(call, by_twos_and_alone(call)[0], evidence, f"{sizes}, pages of {page_size}", expected(call))


def test_X6_a_captured_graph_of_blocks_that_share_keys(dtype: torch.dtype, device: torch.device) -> None:
    call = paged([(250, 9000)] * 4, Shape(128, dtype=dtype), device)
    replays(
        call.with_options(backend=by_twos_and_alone(call)[0]),
        (
            ((250, 250, 250, 250), (9000, 9000, 9000, 9000)),
            ((1, 0, 60, 3), (1, 600, 9000, 0)),
            ((0, 0, 0, 0), (5, 5, 5, 9000)),
            ((1000, 0, 0, 0), (8000, 0, 0, 0)),
            ((193, 385, 1, 0), (193, 300, 600, 113)),
        ),
    )


def test_long_sequences_are_given_to_blocks_that_share_keys(device: torch.device, evidence: Evidence) -> None:
    for pairs, shared in (([(2048, 2048)] * 2, True), ([(2048, 2048), *[(1, 3000)] * 3], False)):
        call = paged(pairs, Shape(128, kv_heads=1, group=4), device)
        with pa_ops.trace.recording() as calls:
            call.run()
        assert any(made.instance.endswith("c2") for made in calls) == shared, pairs


def test_sanitizer_sample_of_blocks_that_share_keys(device: torch.device, evidence: Evidence) -> None:
    """Small enough for compute-sanitizer: a second block with rows and one without, and keys in parts."""
    for pairs in ([(140, 300), (1, 40), (0, 3)], [(30, 3000)]):
        call = paged(pairs, Shape(64, kv_heads=1, group=4), device)
        checked(call, by_twos_and_alone(call)[0], evidence, f"{pairs}", expected(call))
