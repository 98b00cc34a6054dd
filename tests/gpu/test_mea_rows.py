"""What mea costs beside its answer, and how far it reaches: scratch, waits, sizes, masks by each path."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.mea import MASKS, gathered, on_mea
from helpers.padded import Padded
from helpers.padded import check as check_padded
from helpers.parity import Evidence
from helpers.problems import Call, Shape, paged, prefix_sums, sinks, varlen
from helpers.profile import traced
from pa_ops import scratch

pytestmark = pytest.mark.gpu

PREFILL = [(1024, 1024), (30, 900), (500, 2000), (0, 7)]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMalloc")
OPERATORS = {"paged": paged, "dense": varlen}
LARGE = (264, 320, 400, 488, 512)


def extra_bytes(call: Call, work: Any) -> int:
    """The most memory that `work` had at a time beyond what was there before it, once it has been run before."""
    work(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(call)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_B16_scratch_is_tight(head_dim: int, device: torch.device) -> None:
    """Pages are read where they lie: nothing at all. Who gathers them has K and V of the tokens, and no more."""
    call = paged(PREFILL, Shape(head_dim, kv_heads=4, group=2), device).with_options(backend="mea")
    out, lse = call.poisoned_results()
    assert extra_bytes(call, lambda each: each.run_into(out, lse)) == 0
    tokens = int(call.tensors["seqlens_k"].sum())
    both = 2 * tokens * 4 * head_dim * 2
    taken = extra_bytes(call, lambda each: gathered(each).run_into(out, lse))
    padded = call.tensors["block_table"].numel() * 16 * 4 * head_dim * 4
    assert taken <= 1.1 * both and 2 * taken < padded


def test_B17_outputs_stay_in_registers(code: str, device: torch.device, evidence: Evidence) -> None:
    room = scratch.workspace(device.index)
    before = room.clone()
    for head_dim, operator in product((160, 192, 224, 256), OPERATORS):
        call = OPERATORS[operator](PREFILL, Shape(head_dim, kv_heads=1, group=2), device)
        on_mea(call, evidence, f"{code}, {operator}, head size {head_dim}")
        out, lse = call.poisoned_results()
        assert extra_bytes(call.with_options(backend="mea"), lambda each, to=(out, lse): each.run_into(*to)) == 0
    assert torch.equal(room, before), "nor does mea touch the workspace"


def test_B22_prefill_copies_nothing_to_the_host_and_never_waits(
    code: str, device: torch.device, tmp_path: Path
) -> None:
    for number, operator in enumerate(OPERATORS):
        call = OPERATORS[operator](PREFILL, Shape(128), device).with_options(backend="mea")
        call.run()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        events = traced(tmp_path / f"{number}.json", call.run)
        assert any(event["cat"] == "kernel" for event in events), "the trace shows no kernel"
        waits = [e["name"] for e in events if e["cat"] == "cuda_runtime" and e["name"].startswith(WAITS)]
        assert not waits, f"{code}, {operator}: a call waited for the device: {waits}"


def test_B8_head_sizes_beyond_256(code: str, device: torch.device, evidence: Evidence) -> None:
    pairs = [(3, 70), (0, 5), (130, 150), (1, 0), (5, 2), (1, 257), (33, 100)]
    for (mask, options), operator, head_dim in product(MASKS.items(), OPERATORS, LARGE):
        shape = Shape(head_dim, kv_heads=1, group=2, page_size=7)
        more = {"softcap": 5.0, "sinks": sinks(shape, device)} if head_dim % 3 else {}
        call = OPERATORS[operator](pairs, shape, device, **options, **more)
        on_mea(call, evidence, f"{code}, {operator}, {mask}, head size {head_dim}")


def test_B8_C9_head_sizes_beyond_256_in_both_dtypes(
    dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    sizes = ((512, 512), (320, 64), (72, 400))
    for (head_dim, head_dim_v), operator, (mask, options) in product(sizes, OPERATORS, MASKS.items()):
        shape = Shape(head_dim, kv_heads=2, group=1, dtype=dtype, head_dim_v=head_dim_v)
        on_mea(OPERATORS[operator](PREFILL, shape, device, **options), evidence, f"{head_dim}/{head_dim_v}, {mask}")


def test_C16_rows_of_zeros_beyond_2_to_the_31_elements(device: torch.device) -> None:
    tokens, heads, head_dim = (1 << 17) + 5, 64, 256
    assert tokens * heads * head_dim > 1 << 31
    q = torch.ones(tokens, heads, head_dim, dtype=torch.float16, device=device)
    out = torch.full_like(q, torch.nan)
    k = torch.empty(0, 1, head_dim, dtype=torch.float16, device=device)
    none, ends = prefix_sums([0, 0], device), prefix_sums([tokens - 3, 1], device)
    torch.ops.pa_ops.varlen_attention.out(q, k, k, ends, none, backend="mea", out=out)
    rows = out.view(-1, head_dim)
    for first in range(0, (tokens - 2) * heads, 1 << 22):
        assert not rows[first : min(first + (1 << 22), (tokens - 2) * heads)].any(), first
    assert out[tokens - 2 :].isnan().all(), "rows past cu_seqlens_q[-1]"


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256, 512])
def test_C3_C5_C6_C17_masks_by_every_path(code: str, head_dim: int, device: torch.device, evidence: Evidence) -> None:
    kinds = ("bool", "additive", "fp32")
    for seed, (mask, total, queries) in enumerate(product(kinds, (11, 33, 37, 200), (1, 70))):
        axes = (seed % 2 == 0, seed % 3 == 0, seed % 5 != 0, True)
        options = {"causal": seed % 4 == 0, "softcap": 5.0 * (seed % 2), "backend": "mea"}
        case = Padded(queries, total, head_dim=head_dim, mask=mask, mask_axes=axes, options=options, seed=seed)
        call = case.call(device)
        hidden = False if mask == "bool" else (-torch.inf, -1e30, -3e38)[seed % 3] if mask == "fp32" else -torch.inf
        call["attn_mask"][..., 0, :] = hidden
        out = check_padded(call, evidence, f"{code}, {case}")[0]
        assert not out[..., 0, :].any(), f"{code}, {mask}: a row that is hidden whole"
