"""Few tiles, whose keys several blocks of flash_sm90 share: right, by whatever blocks and whoever is last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import pytest
import torch

import pa_ops
from helpers.hopper import FAMILY, MASKS, OPERATORS, SIZES, on_sm90, replays, same_on_streams
from helpers.parity import Evidence, check, repeats
from helpers.problems import Call, Shape, paged, prefix_sums, sinks
from helpers.rooms import poison
from helpers.served import check as check_served
from helpers.serving import serving

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

FEW = (
    [(512, 8192)],
    [(1, 5000)],
    [(100, 3000), (0, 40), (7, 20_000), (3, 3), (1, 0)],
    [(65, 2001), (200, 700), (193, 6000)],
)
WIDE = {**MASKS, "window": {"sliding_window": 2500}}


@contextmanager
def parts_left(device: torch.device, what: object = "", wanted: bool = True) -> Iterator[None]:
    """A block in which some part must leave a state, if that is `wanted`; all of the room for states is NaN before."""
    states = poison(device)
    yield
    assert not wanted or not states.isnan().all(), f"{what}: no part has left a state"


def in_parts(call: Call, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a call of which states are left."""
    with parts_left(device):
        return call.run()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mask", WIDE)
@pytest.mark.parametrize("operator", OPERATORS)
def test_D6_few_tiles_over_many_keys(
    operator: str, mask: str, sizes: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(**SIZES[sizes], kv_heads=2, group=4, dtype=dtype)
    for pairs, softcap in product(FEW, (0.0, 20.0)):
        extra = {**WIDE[mask], "softcap": softcap, "sinks": sinks(shape, device) if softcap else None}
        call = OPERATORS[operator](pairs, shape, device, **extra)
        with parts_left(device, pairs):
            on_sm90(call, evidence, f"{pairs}, {mask}, softcap {softcap}")


@pytest.mark.parametrize("group", [1, 3, 8, 64])
def test_D6_groups_and_numbers_of_parts(group: int, device: torch.device, evidence: Evidence) -> None:
    """From two parts a tile to as many as there may be, of tiles with and without blocks for all of them."""
    shape = Shape(128, kv_heads=1, group=group, dtype=torch.bfloat16)
    for new, keys in product((1, 48, 200, 900), (640, 1281, 12_000)):
        what = f"{new} over {keys}"
        with parts_left(device, what, wanted=keys >= 12_000):
            on_sm90(paged([(min(new, keys), keys), (1, 900)], shape, device), evidence, what)


def test_X2_missing_pages_in_every_part(device: torch.device, evidence: Evidence) -> None:
    for page_size, name in product((16, 64, 256), ("128", "192-128")):
        call = paged([(300, 9000), (5, 4000)], Shape(**SIZES[name], page_size=page_size), device)
        call.tensors["block_table"][:, ::3] = -1
        call.tensors["block_table"][1, :100] = -1
        with parts_left(device, page_size):
            on_sm90(call, evidence, f"pages of {page_size}")


@pytest.mark.parametrize("mask", WIDE)
def test_X12_under_batch_invariance_nothing_is_cut(mask: str, dtype: torch.dtype, device: torch.device) -> None:
    """A long sequence alone has the bits it has before others, beside which it would have other parts, or none."""
    pairs = [(300, 9000), *[(200, 1500)] * 40]
    for sizes in SIZES.values():
        batch = paged(pairs, Shape(**sizes, dtype=dtype), device, backend=FAMILY, **WIDE[mask])
        tensors = {**batch.tensors, "q": batch.tensors["q"][:300], "cu_seqlens_q": prefix_sums([300], device)}
        tensors |= {name: tensors[name][:1] for name in ("seqlens_k", "block_table")}
        alone = Call(batch.op, tensors, 300, batch.options)
        in_parts(alone, device)
        states = poison(device)
        with pa_ops.batch_invariant():
            (out, lse), (mine, my_lse) = batch.run(), alone.run()
        assert states.isnan().all(), f"{sizes}: a part has left a state"
        assert torch.equal(mine, out[:300]) and torch.equal(my_lse, lse[:, :300]), sizes


@pytest.mark.parametrize("mask", WIDE)
def test_C22_two_runs_of_few_tiles_are_bit_equal(mask: str, dtype: torch.dtype, device: torch.device) -> None:
    for sizes, pairs in product(SIZES.values(), FEW):
        call = paged(pairs, Shape(**sizes, dtype=dtype), device, backend=FAMILY, **WIDE[mask])
        repeats(partial(in_parts, call, device), call.rows, sizes)


def test_X6_a_captured_graph_cuts_other_lengths(dtype: torch.dtype, device: torch.device) -> None:
    call = paged([(250, 9000)] * 4, Shape(128, dtype=dtype), device, backend=FAMILY)
    replays(
        call,
        (
            ((250, 250, 250, 250), (9000, 9000, 9000, 9000)),
            ((1, 0, 60, 3), (1, 600, 9000, 0)),
            ((0, 0, 0, 1), (5, 5, 5, 9000)),
            ((1000, 0, 0, 0), (8000, 0, 0, 0)),
        ),
    )


def test_streams_have_states_of_their_own(device: torch.device) -> None:
    calls = [paged(FEW[seed], Shape(128), device, seed=seed, backend=FAMILY) for seed in range(3)]
    same_on_streams(calls)


@pytest.mark.parametrize("new", [40, 300])
def test_A5_rotated_queries_wait_where_the_outputs_of_all_parts_go(
    new: int, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(64, kv_heads=2, group=4, page_size=256)
    for others in ((), (0, 0), (0, 17)):
        lengths = [new, *others]
        with parts_left(device, lengths):
            check_served(serving(lengths, [6000] * len(lengths), shape, device, rotary_dim=64), evidence, lengths)


def test_sanitizer_sample_of_parts(device: torch.device, evidence: Evidence) -> None:
    """Small enough for compute-sanitizer: two tiles a head in parts, and one that is too short for them."""
    shape = Shape(64, kv_heads=1, group=4)
    for options in ({}, {"sliding_window": 3000}):
        check(paged([(70, 5000), (3, 100)], shape, device, backend=FAMILY, **options), evidence, options)
