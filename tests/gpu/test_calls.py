"""What a call must do beyond being right: take views, repeat its bits, say what ran, never wait for the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pa_ops
from helpers.chosen import able, few_and_many, problem_of
from helpers.parity import Evidence, check, error_of, expected
from helpers.problems import Call, Shape, paged, randn, varlen
from helpers.profile import traced
from pa_ops import registry

pytestmark = pytest.mark.gpu

MIXED = [(70, 200), (1, 130), (0, 40), (3, 3), (1, 1), (129, 129)]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMalloc")


@pytest.mark.parametrize("pool", ("fused", "hnd", "packed"))
def test_D10_X9_caches_by_view(pool: str, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for head_dim in (64, 80, 128, 256):
        shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype, page_size=16, pool=pool)
        call = paged(MIXED, shape, device, seed=head_dim)
        assert not call.tensors["k_cache"].is_contiguous()
        check(call, evidence, f"{pool} pool, head size {head_dim}")


def test_X9_queries_keys_and_tables_by_view(device: torch.device, evidence: Evidence) -> None:
    call = varlen(MIXED, Shape(64, kv_heads=2, group=4), device)
    q, k, v = (call.tensors[name] for name in "qkv")
    rows = max(q.shape[0], k.shape[0])
    packed = torch.full((rows, 8 + 2 + 2, 64), torch.nan, dtype=q.dtype, device=device)
    views = packed[: q.shape[0], :8], packed[: k.shape[0], 8:10], packed[: k.shape[0], 10:]
    for view, tensor in zip(views, (q, k, v), strict=True):
        view.copy_(tensor)
    call.tensors.update(zip("qkv", views, strict=True))
    check(call, evidence, "slices of packed QKV")
    sliced = paged(MIXED, Shape(64), device)
    table = sliced.tensors["block_table"]
    sliced.tensors["block_table"] = torch.cat([table - 5, table, table - 5], 1)[:, table.shape[1] : 2 * table.shape[1]]
    check(sliced, evidence, "a slice of table columns")


def test_X5_bounds_never_change_a_result(device: torch.device) -> None:
    call = paged(MIXED, Shape(64), device)
    plain = call.run()
    for bound_q, bound_k in ((129, 200), (150, 1000), (2**20, 2**20)):
        bounded = call.with_options(max_seqlen_q=bound_q, max_seqlen_k=bound_k).run()
        for a, b in zip(plain, bounded, strict=True):
            assert torch.equal(a[: call.rows] if a.dim() == 3 else a[:, : call.rows],
                               b[: call.rows] if b.dim() == 3 else b[:, : call.rows])  # fmt: skip
    with pytest.raises(pa_ops.InvalidArgument, match="max_seqlen_q"):
        call.with_options(max_seqlen_q=-1).run()


def test_X12_bits_do_not_depend_on_neighbours(dtype: torch.dtype, device: torch.device) -> None:
    with pa_ops.batch_invariant():
        call = paged(MIXED * 8, Shape(128, dtype=dtype), device)
        out, lse = call.run()
        again, _ = call.run()
        assert torch.equal(out[: call.rows], again[: call.rows])
        first = 0
        for row, (new, _) in enumerate(MIXED * 8):
            tensors = dict(call.tensors)
            tensors["q"] = tensors["q"][first : first + new]
            tensors["cu_seqlens_q"] = torch.tensor([0, new], dtype=torch.int32, device=device)
            for name in ("seqlens_k", "block_table"):
                tensors[name] = tensors[name][row : row + 1]
            alone_out, alone_lse = Call(call.op, tensors, new, call.options).run()
            assert torch.equal(out[first : first + new], alone_out), f"out of sequence {row}"
            assert torch.equal(lse[:, first : first + new], alone_lse), f"lse of sequence {row}"
            first += new


def test_empty_batches_launch_nothing(device: torch.device) -> None:
    for pairs in ([], [(0, 40), (0, 0)]):
        call = paged(pairs, Shape(64), device)
        call.tensors["q"] = call.tensors["q"][:0]
        out, lse = call.run()
        assert out.shape == (0, 8, 64) and lse.shape == (8, 0)


def test_B26_the_kernel_that_ran_is_on_record(device: torch.device) -> None:
    call = paged(MIXED, Shape(128, dtype=torch.bfloat16), device)
    with pa_ops.trace.recording() as calls:
        call.run()
    assert [(made.op, made.family) for made in calls] == [
        (call.op, family) for family in few_and_many(problem_of(call))
    ]
    names = {entry.name for entry in registry.for_device(0).entries}
    for made in calls:
        assert made.instance in names
        assert made.instance.startswith(f"pa_attn_{made.family}_bf16_kvbf16_d128v128_gather_causal_")


def test_B26_debug_prints_the_decision(device: torch.device) -> None:
    script = (
        "import torch, pa_ops\n"
        "x = torch.zeros(4, 2, 64, dtype=torch.float16, device='cuda')\n"
        "c = torch.tensor([0, 4], dtype=torch.int32, device='cuda')\n"
        "pa_ops.varlen_attention(x, x, x, c, c)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PA_OPS_DEBUG": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    family = few_and_many(pa_ops.Problem(op="varlen_attention", dtype="fp16", head_dim=64, num_heads=2))[1]
    assert "varlen_attention" in run.stderr and f"pa_attn_{family}_fp16_kvfp16_d64v64_dense_causal" in run.stderr


def test_overrides_reach_the_kernels(device: torch.device) -> None:
    call = paged(MIXED, Shape(64), device)
    plain, _ = call.run()
    for family in set(able(problem_of(call))) - {"mea"}:  # that word means mea_decode too
        with pa_ops.trace.recording() as calls:
            forced, _ = call.run(backend=family)
        assert [made.family for made in calls] == [family]
        error_of(forced[: call.rows], plain[: call.rows], plain.dtype, family)
    with pytest.raises(pa_ops.NoInstance, match="k_scale"):
        paged(MIXED, Shape(64), device, k_scale=torch.ones(1, device=device)).run(backend="flash_sm80")


def test_D12_a_quantised_cache_is_refused_and_says_so(device: torch.device) -> None:
    call = paged([(4, 40)], Shape(64), device)
    for name in ("k_cache", "v_cache"):
        call.tensors[name] = call.tensors[name].nan_to_num().to(torch.float8_e4m3fn)
    with pytest.raises(pa_ops.NoInstance, match="e4m3fn"):
        call.run()


@pytest.mark.alone
def test_A12_no_copy_to_the_host_and_no_wait(device: torch.device, tmp_path: Path) -> None:
    decode = paged([(1, 300)] * 16, Shape(128), device)
    mixed = paged(MIXED, Shape(128), device)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode.run()
        mixed.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    events = traced(tmp_path / "trace.json", lambda: (decode.run(), mixed.run()))
    kernels = [e["name"] for e in events if e["cat"] == "kernel"]
    assert kernels, "the trace shows no kernel"
    waits = [e["name"] for e in events if e["cat"] == "cuda_runtime" and e["name"].startswith(WAITS)]
    assert not waits, f"a call waited for the device: {waits}"


def test_A12_X6_graph_replay_while_the_cache_grows(dtype: torch.dtype, device: torch.device) -> None:
    steps, sequences = 64, 5
    shape = Shape(64, kv_heads=2, group=4, dtype=dtype, page_size=16)
    starts = [1, 15, 16, 40, 100]
    call = paged([(1, start + steps) for start in starts], shape, device)
    tensors, lengths = call.tensors, call.tensors["seqlens_k"]
    key, value = (randn(torch.Generator(device).manual_seed(9), dtype, sequences, 2, 64) for _ in "kv")
    slots = torch.zeros(sequences, dtype=torch.int64, device=device)
    caches = tensors["k_cache"], tensors["v_cache"]
    for cache in caches:
        cache.copy_(cache.nan_to_num())
    out, lse = call.poisoned_results()

    def step() -> None:
        torch.ops.pa_ops.append_kv(key, value, *caches, slots)
        call.run_into(out, lse)

    lengths.copy_(torch.tensor(starts, dtype=torch.int32))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    table = tensors["block_table"].cpu()
    generator = torch.Generator(device).manual_seed(3)
    for now in range(steps):
        at = [start + now for start in starts]
        slots.copy_(torch.tensor([int(table[s, p // 16]) * 16 + p % 16 for s, p in enumerate(at)]))
        lengths.copy_(torch.tensor([p + 1 for p in at], dtype=torch.int32))
        for fresh in (key, value, tensors["q"][:sequences]):
            fresh.copy_(randn(generator, dtype, *fresh.shape))
        out.fill_(torch.nan)
        graph.replay()
        replayed = out[:sequences].clone()
        eager, _ = call.run()
        assert torch.equal(replayed, eager[:sequences]), f"step {now}"
        if now % 16 == 0:
            want, _ = expected(call)
            error_of(replayed, want[:sequences], dtype, f"step {now}")


def test_sanitizer_sample_of_everything(device: torch.device, evidence: Evidence) -> None:
    pairs = [(0, 0), (3, 17), (0, 9), (20, 5), (1, 80), (66, 70)]
    for head_dim in (40, 64, 96, 128, 256):
        shape = Shape(head_dim, kv_heads=1, group=3, dtype=torch.bfloat16, page_size=7)
        for options in ({"causal": False}, {"causal": True}, {"sliding_window": 9}):
            check(paged(pairs, shape, device, **options), evidence, f"{head_dim} {options}")
            check(varlen(pairs, shape, device, **options), evidence, f"{head_dim} {options}")
    k_cache = torch.zeros(6, 7, 2, 40, dtype=torch.float16, device=device)
    new = torch.ones(9, 2, 40, dtype=torch.float16, device=device)
    slots = torch.tensor([0, 41, -1, 5, 6, 7, 8, 20, -1], device=device)
    torch.ops.pa_ops.append_kv(new, new, k_cache, k_cache.clone(), slots)
    lse = torch.zeros(2, 9, device=device)
    torch.ops.pa_ops.merge_states(new, lse, new, lse)
    torch.cuda.synchronize()
    assert int(k_cache.sum()) == 7 * 2 * 40
