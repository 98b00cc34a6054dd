"""The operator attention on CPU tensors: its meaning against torch's SDPA, its results, its views for kernels."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings

import pa_ops
from helpers.padded import Padded, expected, problems, sdpa
from pa_ops import InvalidArgument, padded
from pa_ops.padding import LAYOUTS, padding_of


@settings(max_examples=150, derandomize=True)
@given(problems((torch.float32,), largest=32))
def test_C3_C5_C9_C20_the_operator_is_sdpa(case: Padded) -> None:
    call = case.call()
    out, present_key, present_value, _ = pa_ops.attention(**call)
    torch.testing.assert_close(out, sdpa(case, call), atol=2e-4, rtol=2e-4)
    axis = LAYOUTS[case.layout].kv.index("s")
    for present, names in ((present_key, ("past_key", "k")), (present_value, ("past_value", "v"))):
        whole = torch.cat([call[name] for name in names if name in call], axis)
        assert torch.equal(present.nan_to_num(9.0), whole.nan_to_num(9.0)) and present.is_contiguous()


@settings(max_examples=60, derandomize=True)
@given(problems((torch.float16, torch.bfloat16), largest=32))
def test_C8_the_views_that_paged_attention_gets_mean_the_same(case: Padded) -> None:
    call = case.call()
    if call.get("attn_mask") is not None or (case.nonpad is not None and case.options["causal"]):
        return  # a kernel's own, which takes a GPU
    if "sliding_window" in case.options or (case.options["causal"] and not case.past and case.keys < case.queries):
        return
    want = expected(call)
    out, _, _, lse = padded.attention(*(call.pop(name) for name in "qkv"), **call)
    torch.testing.assert_close(out.float(), want[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, want[3], atol=1e-2, rtol=1e-2)


def test_C4_a_mask_of_rank_2_is_rows_by_keys() -> None:
    case = Padded(1, 32, batch=4, dtype=torch.float32, mask="bool", rank=2)
    call = case.call()
    assert call["attn_mask"].shape == (1, 32)
    torch.testing.assert_close(pa_ops.attention(**call)[0], sdpa(case, call), atol=1e-4, rtol=1e-4)
    call["attn_mask"] = torch.ones(4, 32, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match=r"^attn_mask: must be \[Sq, total\] with Sq = 1, total = 32"):
        pa_ops.attention(**call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_C11_the_head_size_of_values_is_that_of_v_everywhere(layout: str) -> None:
    for width, past in product((0, 8, 40), (0, 3)):
        case = Padded(2, 4, past, head_dim=16, head_dim_v=width, layout=layout)
        wide, order = width or 16, LAYOUTS[layout]
        out, key, value, lse = pa_ops.attention(**case.call())
        sizes = {"bnsh": lambda heads, tokens: (2, heads, tokens), "bsnh": lambda heads, tokens: (2, tokens, heads)}
        assert out.shape == (*sizes[order.q](8, 2), wide) and lse.shape == (2, 8, 2)
        assert key.shape == (*sizes[order.kv](2, 4 + past), 16)
        assert value.shape == (*sizes[order.kv](2, 4 + past), wide)


def test_C12_present_is_left_out_where_nobody_asks_for_it() -> None:
    call = Padded(2, 4, 3).call()
    out, key, value, lse = pa_ops.attention(**call, need_present=False)
    assert key.numel() == 0 == value.numel()
    want = pa_ops.attention(**call)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[3])


def test_present_is_never_an_argument() -> None:
    call = Padded(2, 4).call()
    for present, name in zip(pa_ops.attention(**call)[1:3], ("k", "v"), strict=True):
        assert torch.equal(present, call[name]) and present.data_ptr() != call[name].data_ptr()


def test_a_padding_mask_is_lengths_and_no_other_mask_is() -> None:
    for rows, lengths, padding in (
        ([[1, 1, 0], [0, 0, 0]], [2, 0], True),
        ([[1, 1, 1]], [3, 3], True),
        ([[1, 0, 1], [1, 1, 1]], [2, 3], False),
        ([[0, 1, 1]], [2, 2], False),
    ):
        for shape in ((-1, 1, 1, 3), (1, 1, 3), (1, 3))[: 1 if len(rows) > 1 else 3]:
            found, is_padding = padding_of(torch.tensor(rows, dtype=torch.bool).reshape(shape), 2)
            assert (found.tolist(), found.dtype, bool(is_padding)) == (lengths, torch.int32, padding)


@pytest.mark.parametrize("mask", ["bool", "additive", "fp32"])
def test_C13_C14_C15_rows_that_see_no_key_are_zeros_whatever_v_holds(mask: str) -> None:
    call = Padded(4, 6, past=2, batch=3, mask=mask, nonpad=(0, 5, 8), poison=True, options={"causal": True}).call()
    call["attn_mask"][:, :, 2] = False if mask == "bool" else -torch.inf
    out, _, _, lse = pa_ops.attention(**call)
    assert out.isfinite().all()
    assert not out[0].any() and not out[:, :, 2].any()
    assert (lse[0] == -torch.inf).all() and (lse[:, :, 2] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_C17_sentinels_hide(dtype: torch.dtype) -> None:
    call = Padded(4, 6, dtype=dtype, mask="additive").call()
    want = pa_ops.attention(**call)
    for value in (-1e30, -3e38, torch.finfo(dtype).min):
        low = torch.tensor(value).to(dtype).item()
        changed = {**call, "attn_mask": torch.where(call["attn_mask"] == -torch.inf, low, call["attn_mask"])}
        out, _, _, lse = pa_ops.attention(**changed)
        assert out.isfinite().all()
        if low <= -1e30:
            assert torch.equal(out, want[0]) and torch.equal(lse, want[3])


def test_C20_positions_begin_at_the_first_key_without_a_past_and_end_at_the_last_with_one() -> None:
    call = Padded(2, 4, batch=1, kv_heads=1, group=1, head_dim=8, options={"causal": True}).call()
    v = call["v"].float()
    first = pa_ops.attention(**call)[0].float()
    torch.testing.assert_close(first[0, 0, 0], v[0, 0, 0], atol=1e-3, rtol=1e-3)
    call.update(past_key=call["k"][:, :, :0], past_value=call["v"][:, :, :0])
    assert not torch.allclose(pa_ops.attention(**call)[0].float()[0, 0, 0], v[0, 0, 0], atol=1e-2)
    few = Padded(4, 1, 1, batch=1, options={"causal": True}).call()  # the first two rows stand before every key
    out = pa_ops.attention(**few)[0]
    assert not out[:, :, :2].any() and out[:, :, 2:].any()


def test_C21_softcap_comes_before_the_mask() -> None:
    for hidden in ("bool", "additive", "causal", "window", "length"):
        call = Padded(4, 4, batch=1, options={"softcap": 1.0}).call()
        call["v"].fill_(0.2)
        call["v"][:, :, 0 if hidden == "window" else 3] = 1000.0
        rows = slice(2, 4) if hidden == "window" else slice(0, 3)
        if hidden == "length":
            call["nonpad_kv_seqlen"] = torch.tensor([3])
        elif hidden in ("bool", "additive"):
            seen = torch.arange(4)[None] < 3
            call["attn_mask"] = seen if hidden == "bool" else torch.where(seen, 0.0, -torch.inf)
        else:
            call.update(causal=True, sliding_window=2 if hidden == "window" else 0)
        assert (pa_ops.attention(**call)[0][:, :, rows] - 0.2).abs().max() < 0.02, hidden


def test_empty_batches_and_keys_are_results_too() -> None:
    for case in (Padded(0, 3), Padded(3, 0, batch=2), Padded(2, 3, batch=0)):
        call = case.call()
        out, key, _, lse = pa_ops.attention(**call)
        assert out.shape == call["q"].shape and not out.any() and (lse == -torch.inf).all()
        assert key.shape == call["k"].shape
        again = padded.attention(*(call.pop(name) for name in "qkv"), **call)
        assert torch.equal(again[0], out) and torch.equal(again[3], lse)
    sinks = torch.tensor([1.0, 2.0])
    call = Padded(3, 0, batch=1, kv_heads=1, group=2, options={"sinks": sinks}).call()
    for lse in (pa_ops.attention(**call)[3], padded.attention(*(call.pop(n) for n in "qkv"), **call)[3]):
        assert torch.equal(lse, sinks[None, :, None].expand(1, 2, 3))


def test_checked_mode_tells_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    with pytest.raises(InvalidArgument, match=r"^nonpad_kv_seqlen: must be in \[0, 9\], .* sequence 1; got .*= 10"):
        pa_ops.attention(**Padded(2, 5, 4, nonpad=(9, 10)).call())
