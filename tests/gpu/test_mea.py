"""The mea families on the GPU: forced in both dtypes, and each older instruction path through its PTX."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

import pa_ops
from helpers import served
from helpers.chosen import few_and_many, problem_of
from helpers.mea import MASKS, PTX, on_decode, on_mea
from helpers.padded import Padded
from helpers.padded import check as check_padded
from helpers.parity import Evidence, check, repeats
from helpers.problems import PAIRS, Shape, moved_far, paged, punch_holes, sinks, varlen
from helpers.serving import serving
from pa_ops.bench_mea import only

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 128, 256)
TILES = (32, 64, 128)  # query rows of a block
SHORT = [(0, 0), (3, 70), (0, 5), (130, 150), (1, 0), (5, 2), (1, 257), (65, 64), (33, 300)]
OPERATORS = {"paged": paged, "dense": varlen}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
def test_B1_every_path_and_mask(code: str, mask: str, head_dim: int, device: torch.device, evidence: Evidence) -> None:
    for operator, (seed, (softcap, extra)) in product(OPERATORS, enumerate(product((0.0, 5.0), (False, True)))):
        shape = Shape(head_dim, kv_heads=2, group=3, page_size=(16, 1, 7, 64)[seed])
        options = {**MASKS[mask], "softcap": softcap, "sinks": sinks(shape, device) if extra else None}
        call = OPERATORS[operator](SHORT, shape, device, seed=seed, **options)
        on_mea(call, evidence, f"{code}, {operator}, {options}")


def test_B8_every_head_size(code: str, device: torch.device, evidence: Evidence) -> None:
    for head_dim, operator in product(range(8, 257, 8), OPERATORS):
        call = OPERATORS[operator](SHORT, Shape(head_dim, kv_heads=1, group=2), device, seed=head_dim)
        on_mea(call, evidence, f"{code}, head size {head_dim}")


def test_C9_head_sizes_of_keys_and_values_differ(code: str, device: torch.device, evidence: Evidence) -> None:
    for (head_dim, head_dim_v), operator in product(((32, 64), (64, 32), (128, 72), (192, 128), (40, 256)), OPERATORS):
        shape = Shape(head_dim, kv_heads=1, group=8, head_dim_v=head_dim_v)
        on_mea(OPERATORS[operator](SHORT, shape, device), evidence, f"{code}, {head_dim}/{head_dim_v}")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_B4_forced_in_both_dtypes(
    operator: str, head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for seed, (mask, group) in enumerate(product(MASKS, (1, 4, 7))):
        shape = Shape(head_dim, kv_heads=2, group=group, dtype=dtype)
        on_mea(OPERATORS[operator](PAIRS, shape, device, seed=seed, **MASKS[mask]), evidence, f"{mask}, group {group}")


def test_B4_every_override_reaches_mea(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = paged([(40, 100)], Shape(128, dtype=dtype), device)

    def family() -> str:
        call.run()
        last = pa_ops.trace.last()
        assert last is not None
        return last.family

    _, usual = few_and_many(problem_of(call))
    assert family() == usual and usual.startswith("flash_")
    with pa_ops.backend("mea"):
        assert family() == "mea"
    monkeypatch.setenv("PA_OPS_DISABLE", "flash")
    assert family() == "mea"
    monkeypatch.setenv("PA_OPS_DISABLE", "")
    assert family() == usual


@pytest.mark.parametrize("rotary_dim", [0, 64])
def test_A7_exact_lengths_in_the_serving_operator(
    code: str, rotary_dim: int, device: torch.device, evidence: Evidence
) -> None:
    around = [[size + more, 0] for size in TILES for more in (-1, 0, 1)]
    mixes = [[10, 0, 0, 0], [0, 7, 0, 3], [0, 0, 0, 5], [0, 3, 0], [10] + [0] * 15, [10] + [0] * 63, [257, 0, 0]]
    for new in (*around, *mixes):
        past = [(7 * row) % 50 for row in range(len(new))]
        call = serving(new, past, Shape(64, 2, 4, page_size=256), device, rotary_dim=rotary_dim, spare=2, backend="mea")
        served.check(call, evidence, f"{code}, new {new}")


def test_B21_lengths_around_the_rows_of_a_tile(device: torch.device, evidence: Evidence) -> None:
    for head_dim, size, more in product(HEAD_DIMS, TILES, (-1, 0, 1)):
        pairs = [(size + more, size + more), (0, 3), (2 * size + more, 300)]
        on_mea(paged(pairs, Shape(head_dim), device), evidence, f"head size {head_dim}, {pairs}")


def test_D1_D4_short_sequences_and_decode_rows(device: torch.device, evidence: Evidence) -> None:
    for length, new in product((1, 5, 9, 15, 16, 17, 25, 33), (1, None)):
        shape = Shape(64, kv_heads=2, group=7, page_size=16)
        on_mea(paged([(new or length, length)], shape, device, seed=length), evidence, f"length {length}")


def test_D6_page_boundaries(device: torch.device, evidence: Evidence) -> None:
    for page in (1, 3, 16, 32, 48, 64, 128, 256):
        pairs = [(new, kv) for kv in sorted({page - 1, page, page + 1, 2 * page + 1}) for new in (1, kv)]
        for head_dim in HEAD_DIMS:
            on_mea(paged(pairs, Shape(head_dim, page_size=page), device, seed=page), evidence, f"page {page}")


def test_C14_C15_holes_and_rows_without_keys_are_zeros(code: str, device: torch.device, evidence: Evidence) -> None:
    for page_size, causal in product((1, 16, 64), (False, True)):
        call = paged([(5, 300), (1, 64), (40, 40)], Shape(64, page_size=page_size), device, causal=causal)
        punch_holes(call)
        out, lse = on_mea(call, evidence, f"{code}, holes, page {page_size}")
        assert not out[-40:].any() and (lse[:, -40:] == -torch.inf).all()


def test_logits_that_overflow_without_a_maximum(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for operator in OPERATORS.values():
        call = operator([(70, 300), (1, 129)], Shape(128, dtype=dtype), device)
        on_mea(call.with_options(softmax_scale=8.0), evidence, "scale 8")


def test_C22_two_runs_are_bit_equal(code: str, device: torch.device) -> None:
    for head_dim in HEAD_DIMS:
        call = paged([(70, 900), (1, 5000)], Shape(head_dim), device)
        repeats(partial(call.run, backend="mea"), call.rows, head_dim)


@pytest.mark.alone
def test_B18_B19_offsets_beyond_32_bits(device: torch.device, evidence: Evidence) -> None:
    shape = Shape(128, kv_heads=8, group=1, page_size=256)
    far = moved_far(paged([(3, 300), (70, 513)], shape, device), 8300)
    on_mea(far, evidence, "pages beyond 2^31 elements")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_B1_few_rows_by_every_path(code: str, head_dim: int, device: torch.device, evidence: Evidence) -> None:
    pairs = [(1, 5000), (0, 5), (2, 130), (1, 0), (17, 40), (1, 1), (3, 2), (1, 65)]
    for seed, (options, group) in enumerate(product(MASKS.values(), (1, 3, 8, 20))):
        shape = Shape(head_dim, kv_heads=2, group=group, page_size=(16, 1, 7, 64)[seed % 4])
        extra = {"softcap": 5.0, "sinks": sinks(shape, device)} if seed % 2 else {}
        call = paged(pairs, shape, device, seed=seed, **options, **extra)
        on_decode(call, evidence, f"{code}, group {group}, {options}")


def test_B8_few_rows_of_every_head_size(code: str, device: torch.device, evidence: Evidence) -> None:
    for head_dim in range(8, 257, 8):
        shape = Shape(head_dim, kv_heads=1, group=4)
        on_decode(paged([(1, 700), (3, 70)], shape, device, seed=head_dim), evidence, f"{code}, head size {head_dim}")


def test_B4_few_rows_in_both_dtypes(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for head_dim, sequences in product(HEAD_DIMS, (1, 3, 33, 300)):
        pairs = [(1, 1 + (97 * row * row) % 1500) for row in range(sequences)]
        on_decode(paged(pairs, Shape(head_dim, dtype=dtype), device), evidence, f"{sequences} sequences of {head_dim}")


def test_C14_few_rows_with_holes(code: str, device: torch.device, evidence: Evidence) -> None:
    for page_size, causal in product((1, 16, 64), (False, True)):
        call = paged([(1, 300), (4, 64), (3, 40)], Shape(64, page_size=page_size), device, causal=causal)
        punch_holes(call)
        out, lse = on_decode(call, evidence, f"{code}, holes, page {page_size}")
        assert not out[-3:].any() and (lse[:, -3:] == -torch.inf).all()


def test_X10_a_mixed_batch_is_divided_between_the_two(code: str, device: torch.device, evidence: Evidence) -> None:
    call = paged([(1, 900), (70, 300), (4, 4), (0, 3), (5, 130)], Shape(128), device)
    with pa_ops.trace.recording() as calls:
        check(call.with_options(backend="mea"), evidence, code)
    assert [made.family for made in calls] == ["mea_decode", "mea"]


def test_C22_few_rows_twice_are_bit_equal(code: str, device: torch.device) -> None:
    call = paged([(1, 4000), (1, 77), (2, 9000), (1, 1)], Shape(128, kv_heads=4, group=8), device)
    repeats(partial(call.run, backend="mea_decode"), call.rows)


@pytest.mark.parametrize("head_dim", (40, 128, 256))
def test_sanitizer_sample_of_mea(head_dim: int, device: torch.device, evidence: Evidence) -> None:
    pairs = [(0, 0), (3, 17), (0, 9), (20, 5), (1, 80), (66, 70)]
    for dtype in (torch.float16, torch.bfloat16):
        shape = Shape(head_dim, kv_heads=1, group=3, dtype=dtype, page_size=7)
        for options in MASKS.values():
            on_mea(paged(pairs, shape, device, **options), evidence, f"{head_dim} {options}")
            on_mea(varlen(pairs, shape, device, **options), evidence, f"{head_dim} {options}")
            on_decode(paged([(1, 900), *pairs], shape, device, **options), evidence, f"{head_dim} {options}")


def test_sanitizer_sample_of_older_code(device: torch.device, evidence: Evidence) -> None:
    """Several blocks of keys, so that warps reuse what they trade through; mask tensors, which are mea's by name."""
    for target in PTX:
        with only(target):
            for head_dim, operator in product((128, 256), OPERATORS.values()):
                on_mea(operator([(66, 200)], Shape(head_dim, 1, 1, page_size=16), device), evidence, target)
            masked = Padded(66, 130, head_dim=256, kv_heads=1, group=1, mask="additive", options={"backend": "mea"})
            check_padded(masked.call(device), evidence, f"{target}, mask")


@pytest.mark.parametrize("window", (0, 50))
def test_X7_sinks_by_every_path(code: str, window: int, device: torch.device, evidence: Evidence) -> None:
    for operator, softcap in product(OPERATORS, (0.0, 20.0)):
        shape = Shape(128, kv_heads=2, group=4)
        values = torch.linspace(-2, 6, shape.heads, device=device)
        options = {"sinks": values, "sliding_window": window, "softcap": softcap}
        on_mea(OPERATORS[operator](SHORT, shape, device, **options), evidence, f"{code}, {operator}, {window}")
