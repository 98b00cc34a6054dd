"""Parity of every attention instance with the fp32 reference, over lengths, pages, groups, masks, softcap and sinks.

Every call runs as it would by itself, where few query rows have a kernel of their own; then on the prefill family that
is preferred here, alone; then on flash_sm80, which is another one on SM 9.0.
"""

from __future__ import annotations

from itertools import cycle, product
from math import log
from typing import Any

import pytest
import torch

from helpers.parity import Evidence, check, check_each
from helpers.problems import PAIRS, Shape, paged, punch_holes, sinks, varlen

pytestmark = pytest.mark.gpu

BACKENDS = ("auto", "flash", "flash_sm80")
HEAD_DIMS = (64, 96, 128, 192, 256)
PAGE_SIZES = (1, 16, 64, 256)
GROUPS = (1, 4, 5, 7, 8, 32)
MASKS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "sliding_window": 63},
}
WINDOWS = (1, 16, 17, 64, 65, 1000, 5000)
EXTRAS = tuple(product((0.0, 5.0), (False, True)))  # softcap, sinks
OPERATORS = {"paged": paged, "dense": varlen}


def extras(shape: Shape, device: torch.device, softcap: float, with_sinks: bool) -> dict[str, Any]:
    return {"softcap": softcap, "sinks": sinks(shape, device) if with_sinks else None}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_X1_X2_paged_lengths_pages_masks_extras(
    head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    groups = cycle(GROUPS)
    for seed, (page_size, mask, (softcap, with_sinks)) in enumerate(product(PAGE_SIZES, MASKS, EXTRAS)):
        group = next(groups)
        shape = Shape(head_dim, kv_heads=1 if group >= 7 else 2, group=group, dtype=dtype, page_size=page_size)
        more = extras(shape, device, softcap, with_sinks)
        call = paged(PAIRS, shape, device, seed=seed, **MASKS[mask], **more)
        check_each(
            call, BACKENDS, evidence, f"page {page_size}, {mask}, group {group}, softcap {softcap}, sinks {with_sinks}"
        )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_B15_dense_lengths_masks_extras(
    head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    groups = cycle(GROUPS)
    for seed, (mask, (softcap, with_sinks)) in enumerate(product(MASKS, EXTRAS)):
        group = next(groups)
        shape = Shape(head_dim, kv_heads=1 if group >= 7 else 2, group=group, dtype=dtype)
        call = varlen(PAIRS, shape, device, seed=seed, **MASKS[mask], **extras(shape, device, softcap, with_sinks))
        check_each(call, BACKENDS, evidence, f"{mask}, group {group}, softcap {softcap}, sinks {with_sinks}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_X11_every_group(operator: str, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    pairs = [(1, 130), (0, 5), (3, 3), (17, 40), (130, 200)]
    for group, (mask, options) in product((*range(1, 17), 32), MASKS.items()):
        shape = Shape(64, kv_heads=2, group=group, dtype=dtype)
        call = OPERATORS[operator](pairs, shape, device, seed=group, **options)
        check_each(call, BACKENDS, evidence, f"group {group}, {mask}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_X11_every_head_size(operator: str, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    pairs = [(1, 130), (0, 5), (65, 65), (2, 0), (17, 40)]
    for head_dim, (mask, options) in product(range(8, 257, 8), MASKS.items()):
        shape = Shape(head_dim, kv_heads=2, group=3, dtype=dtype)
        call = OPERATORS[operator](pairs, shape, device, seed=head_dim, **options)
        check_each(call, BACKENDS, evidence, f"head size {head_dim}, {mask}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_window(operator: str, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    shape = Shape(64, kv_heads=1, group=2, dtype=dtype, page_size=16)
    for window, causal in product(WINDOWS, (False, True)):
        call = OPERATORS[operator](PAIRS, shape, device, seed=window, sliding_window=window, causal=causal)
        check_each(call, BACKENDS, evidence, f"window {window}, causal {causal}")


def test_D6_page_boundaries(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for page in (1, 3, 8, 16, 32, 48, 64, 128, 256):
        lengths = sorted({page - 1, page, page + 1, 2 * page + 1})
        pairs = [(new, kv) for kv in lengths for new in (1, kv)]
        for head_dim in (64, 128):
            shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype, page_size=page)
            call = paged(pairs, shape, device, seed=page)
            check_each(call, BACKENDS, evidence, f"page {page}, head size {head_dim}")


def test_D1_short_sequences(device: torch.device, evidence: Evidence) -> None:
    for length in (1, 5, 9, 15, 16, 17, 25, 33):
        shape = Shape(64, kv_heads=2, group=7, page_size=16)
        check_each(paged([(length, length)], shape, device, seed=length), BACKENDS, evidence, f"length {length}")


def test_D2_one_token_cached(device: torch.device, evidence: Evidence) -> None:
    check_each(paged([(8, 9)], Shape(64, kv_heads=2, group=7, page_size=16), device), BACKENDS, evidence)


def test_logits_that_overflow_without_a_maximum(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for operator in OPERATORS.values():
        call = operator([(70, 300), (1, 129)], Shape(128, dtype=dtype), device)
        check_each(call.with_options(softmax_scale=8.0), BACKENDS, evidence, "scale 8")


def test_scores_that_outgrow_every_exponent(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    """Of a row's last block of keys and all others: a kernel that trusts the maxima of the one has to notice."""
    pairs = [(300, 900), (1, 129), (200, 200)]
    for head_dim, (name, operator) in product((64, 96, 128, 256), OPERATORS.items()):
        for options in ({"causal": True}, {"causal": False}, {"causal": True, "sliding_window": 500}):
            call = operator(pairs, Shape(head_dim, dtype=dtype), device, softmax_scale=24.0, **options)
            if name == "dense":
                bits = 24.0 / log(2) * call.tensors["q"][:300, 0].float() @ call.tensors["k"][:900, 0].float().T
                assert (bits[:, :700].amax(1) - bits[:, 700:].amax(1)).max() > 128
            check_each(call, BACKENDS, evidence, f"{name}, head size {head_dim}, {options}")


def test_outputs_that_overflow_before_their_sums(device: torch.device, evidence: Evidence) -> None:
    for head_dim, operator in product((64, 128, 256), OPERATORS.values()):
        call = operator([(300, 900), (1, 129)], Shape(head_dim, dtype=torch.bfloat16), device, softmax_scale=3.0)
        values = [tensor for name, tensor in call.tensors.items() if name.startswith("v")]
        assert len(values) == 1
        values[0].abs_().mul_(1e30)
        check_each(call, BACKENDS, evidence, f"head size {head_dim}")


def test_unmapped_pages_in_the_middle_are_masked(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for page_size, causal, backend in product((1, 16, 64), (False, True), BACKENDS):
        call = paged([(5, 300), (1, 64), (40, 40)], Shape(64, dtype=dtype, page_size=page_size), device, causal=causal)
        punch_holes(call)
        what = f"holes in the table, page {page_size}, causal {causal}, backend {backend}"
        out, lse = check(call.with_options(backend=backend), evidence, what)
        assert not out[-40:].any(), "a sequence with no mapped page is exact zeros"
        assert (lse[:, -40:] == -torch.inf).all()
