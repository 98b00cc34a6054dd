"""The operator attention on CPU tensors: its meaning against torch's SDPA, its results, its views for kernels."""

from __future__ import annotations

import torch
from hypothesis import given, settings

import pa_ops
from helpers.padded import Padded, expected, problems, sdpa
from pa_ops import padded
from pa_ops.padding import LAYOUTS

BASE = Padded(5, 7, batch=3, kv_heads=2, group=2, head_dim=16, dtype=torch.float32)


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
