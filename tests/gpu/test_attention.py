"""The operator attention on the GPU: every checklist row of padded batches, each family that serves it, and SDPA."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import pa_ops
from helpers.padded import Padded, check, problems, sdpa
from helpers.parity import Evidence, error_of
from pa_ops.padding import LAYOUTS

pytestmark = pytest.mark.gpu

DECODE = {"queries": 1, "keys": 1}
MASKED = ("bool", "additive", "fp32")
FAMILIES = ("flash_sm80", "flash_sm90", "mea")
MASK_FAMILIES = ("flash_sm80", "flash_sm90", "mea")
HIDDEN = {"bool": False, "additive": -torch.inf}


def run(case: Padded, device: torch.device, evidence: Evidence) -> tuple[torch.Tensor, ...]:
    return check(case.call(device), evidence, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_C1_C2_decode_with_past_by_family(
    family: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for batch, past, group, head_dim, softcap in product((1, 2), (31, 32, 127, 511), (1, 2, 4), (64, 128), (0.0, 50.0)):
        options = {"causal": True, "softcap": softcap, "backend": family}
        page = past + 1
        if family == "flash_sm90" and page % 8:
            continue  # a page is the sequence, and boxes are of 8 keys
        case = Padded(**DECODE, past=past, batch=batch, group=group, head_dim=head_dim, dtype=dtype, options=options)
        run(case, device, evidence)


def test_C3_C4_C5_masks_of_each_rank_with_a_past(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for mask, rank, layout in product(MASKED, (2, 3, 4), LAYOUTS):
        case = Padded(1, 1, 31, dtype=dtype, head_dim=128, mask=mask, rank=rank, layout=layout)
        run(case, device, evidence)
    for axes in product((False, True), repeat=4):
        run(Padded(130, 72, 8, dtype=dtype, mask="bool", mask_axes=axes), device, evidence)
        run(Padded(70, 192, dtype=dtype, mask="additive", mask_axes=axes), device, evidence)
    run(Padded(1, 32, batch=4, mask="bool", rank=2), device, evidence)


@pytest.mark.parametrize(("head_dim", "family"), [*product((40, 64, 96, 128, 192, 256), MASK_FAMILIES), (512, "mea")])
def test_C3_C5_masks_at_every_head_size_and_option(
    head_dim: int, family: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for mask, causal, window, softcap in product(("none", *MASKED), (False, True), (0, 37), (0.0, 5.0)):
        if family == "flash_sm90" and mask == "fp32":
            continue  # it holds a mask's words in registers, of two bytes at most
        options: dict[str, Any] = {"causal": causal, "sliding_window": window, "softcap": softcap, "backend": family}
        nonpad = (0, 64, 201)
        case = Padded(
            150, 256, batch=3, kv_heads=2, group=2, head_dim=head_dim, dtype=dtype, mask=mask, options=options
        )
        run(case, device, evidence)
        poisoned = Padded(**{**vars(case), "nonpad": nonpad, "poison": True})
        assert run(poisoned, device, evidence)[0].isfinite().all()


def test_C6_totals_that_are_not_aligned(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for total, queries, mask in product((11, 33, 35, 37), (1, 9, 70), MASKED):
        run(Padded(queries, total - 4, 4, dtype=dtype, mask=mask, options={"causal": True}), device, evidence)
        run(Padded(queries, total, dtype=dtype, head_dim=32, head_dim_v=64, mask=mask), device, evidence)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_C8_both_orders_tracked_apart(
    layout: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for queries, past, mask in product((1, 70), (0, 32), ("none", "bool")):
        case = Padded(queries, 72, past, dtype=dtype, head_dim=128, layout=layout, mask=mask)
        run(case, device, evidence)


def test_C9_C10_head_sizes_of_keys_and_values_differ(
    dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for (head_dim, head_dim_v), past, queries in product(((32, 64), (64, 32), (128, 72)), (0, 31), (1, 4, 70)):
        case = Padded(queries, 73, past, kv_heads=1, group=8, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
        results = run(case, device, evidence)
        assert results[2].shape[-1] == head_dim_v and results[0].isfinite().all()


def test_C12_present_is_written_once(device: torch.device) -> None:
    case = Padded(1, 1, 63, head_dim=128, batch=4)
    for need in (True, False):
        call = {**case.call(device), "need_present": need}
        results = pa_ops.attention(**call)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            results = pa_ops.attention(**call)
            torch.cuda.synchronize()
        names = [event.key for event in profile.key_averages() for _ in range(event.count)]
        copies = [name for name in names if "CatArray" in name or "opy" in name or "emcpy" in name]
        assert len(copies) == 2, f"K and V are copied once each: {names}"
        assert [result.numel() > 0 for result in results[1:3]] == [need, need]


def test_C13_garbage_behind_the_lengths_cannot_leak(
    dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for queries, mask, causal in product((1, 60), ("none", "bool", "additive"), (False, True)):
        case = Padded(queries, 264, dtype=dtype, nonpad=(9, 130), poison=True, mask=mask, options={"causal": causal})
        assert run(case, device, evidence)[0].isfinite().all()


def test_C14_sequences_of_no_keys_are_zeros(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for queries, mask in product((1, 20), ("none", "bool")):
        case = Padded(queries, 16, dtype=dtype, nonpad=(0, 16), poison=True, mask=mask)
        out, _, _, lse = run(case, device, evidence)
        assert not out[0].any() and (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("kind", HIDDEN)
def test_C15_rows_that_see_no_key_are_zeros_whatever_v_holds(
    kind: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    call = Padded(40, 64, dtype=dtype, mask=kind).call(device)
    call["attn_mask"][0, :, 3] = HIDDEN[kind]
    out, _, _, lse = check(call, evidence, kind)
    assert not out[0, :, 3].any() and (lse[0, :, 3] == -torch.inf).all()
    call["v"][0], call["attn_mask"][0] = torch.nan, HIDDEN[kind]
    out = pa_ops.attention(**call)[0]
    assert not out[0].any() and out[1].isfinite().all()
    apart = Padded(8, 4, 1, dtype=dtype, options={"causal": True}).call(device)
    assert not check(apart, evidence, "window")[0][:, :, :3].any()


def test_C17_sentinels_survive(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for value, mask in product((-1e30, -3e38, -torch.inf, torch.finfo(dtype).min), ("additive", "fp32")):
        call = Padded(40, 64, dtype=dtype, mask=mask).call(device)
        given = call["attn_mask"]
        low = torch.tensor(value, device=device).to(given.dtype)  # of fp16 they are infinite, but for its own least
        call["attn_mask"] = torch.where(given == -torch.inf, low, given)
        assert check(call, evidence, value)[0].isfinite().all()
        call["attn_mask"] = low.expand_as(given).contiguous()
        out, _, _, lse = pa_ops.attention(**call)
        assert out.isfinite().all()
        if low <= -1e30:
            assert not out.any() and (lse == -torch.inf).all()


def test_C20_where_positions_begin(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for (queries, keys, past), mask, window in product(
        ((40, 104, 0), (104, 40, 0), (64, 64, 0), (40, 40, 64), (120, 40, 16), (1, 1, 7)), ("none", "bool"), (0, 9)
    ):
        options = {"causal": True, "sliding_window": window}
        run(Padded(queries, keys, past, dtype=dtype, mask=mask, options=options), device, evidence)


@pytest.mark.parametrize("family", FAMILIES)
def test_C21_softcap_comes_before_what_hides(family: str, dtype: torch.dtype, device: torch.device) -> None:
    for hidden in ("mask", "causal", "window", "length"):
        call = Padded(16, 16, dtype=dtype, head_dim=64, options={"softcap": 1.0, "backend": family}).call(device)
        call["v"].fill_(0.2)
        first = 0 if hidden == "window" else 15
        call["v"][:, :, first] = 1000.0
        rows = slice(8, 15) if hidden == "window" else slice(0, 15)
        if hidden == "mask":
            if family not in MASK_FAMILIES:
                continue
            call["attn_mask"] = torch.ones(16, 16, dtype=torch.bool, device=device)
            call["attn_mask"][:, 15] = False
        elif hidden == "length":
            call["nonpad_kv_seqlen"] = torch.tensor([15, 15], device=device)
        else:
            call.update(causal=True, sliding_window=4 if hidden == "window" else 0)
        out = pa_ops.attention(**call)[0][:, :, rows]
        assert (out - 0.2).abs().max() < 0.02, (hidden, family)


def test_C22_two_runs_are_equal_bit_by_bit(dtype: torch.dtype, device: torch.device) -> None:
    for mask in ("none", *MASKED):
        call = Padded(130, 264, dtype=dtype, head_dim=128, mask=mask).call(device)
        first, second = (pa_ops.attention(**call) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_padding_masks_are_lengths_and_others_are_not(
    dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for queries, group in product((1, 5, 130), (1, 4)):
        case = Padded(
            queries, 208, batch=3, group=group, dtype=dtype, mask="bool", mask_axes=(True, False, False, True)
        )
        call = case.call(device)
        keys = torch.arange(208, device=device)
        for seen in (keys < torch.tensor([[0], [13], [208]], device=device), keys.expand(3, 208) % 7 > 0):
            call["attn_mask"] = seen[:, None, None].contiguous()
            check(call, evidence, case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = pa_ops.attention(**call)[0]
        for last in (200, 208):  # a padding mask, then one with a hole: the same graph serves both
            call["attn_mask"].copy_((keys < last)[None, None, None] & (keys != (120 if last == 208 else -1)))
            graph.replay()
            assert torch.equal(out, pa_ops.attention(**call)[0])
            error_of(out, sdpa(case, call), dtype, f"replay, {last}")


def test_a_captured_call_is_replayed(device: torch.device, evidence: Evidence) -> None:
    for mask in ("none", "bool"):
        call = Padded(20, 64, nonpad=(10, 30), mask=mask).call(device)
        check(call, evidence, "before capture")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = pa_ops.attention(**call)[0]
        call["nonpad_kv_seqlen"].copy_(torch.tensor([64, 3]))
        graph.replay()
        want = pa_ops.attention(**call)[0]
        assert torch.equal(out, want)


@settings(
    max_examples=500, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(case=problems((torch.float16, torch.bfloat16)))
def test_D5_problems_by_chance_against_sdpa(case: Padded, device: torch.device) -> None:
    call = case.call(device)
    out = pa_ops.attention(**call)[0]
    error_of(out, sdpa(case, call), case.dtype, str(case))
