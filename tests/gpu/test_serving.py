"""The serving operator on the GPU: exact for any mix of lengths, in place, without the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.parity import Evidence
from helpers.problems import Shape
from helpers.profile import traced
from helpers.served import check, refer, same_cache, serve
from helpers.serving import images, places, serving, slot_mapping, twin
from pa_ops import bench_serving
from pa_ops.bench_timers import back_to_back
from pa_ops.spec import Family

pytestmark = pytest.mark.gpu

C0 = Shape(64, kv_heads=2, group=4, page_size=256)
TILES = (64, 128, 192)  # rows of the tiles of the prefill families
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@pytest.mark.parametrize("rotary_dim", [64, 32, 0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_A3_every_token_of_the_only_busy_sequence_is_rotated(
    rotary_dim: int, interleaved: bool, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(64, kv_heads=2, group=4, page_size=256, dtype=dtype)
    call = serving([10, 0, 0, 0], [54, 3, 0, 64], shape, device, rotary_dim=rotary_dim, rotary_interleaved=interleaved)
    check(call, evidence, "10, 0, 0, 0")
    mine, theirs = twin(call), twin(call)
    serve(mine)
    refer(theirs)
    for token in (7, 8, 9):
        page, offset = places(call)[0][token]
        same_cache(mine["k_cache"][page, offset], theirs["k_cache"][page, offset], f"key of token {token}")


@pytest.mark.parametrize("rotary_dim", [64, 0])
@pytest.mark.parametrize("rows", TILES)
def test_A4_row_tiles_beside_sequences_without_tokens(
    rows: int, rotary_dim: int, device: torch.device, evidence: Evidence
) -> None:
    for new in ([rows - 1, 0], [rows, 0], [rows + 1, 0], [2 * rows + 1, 0, 0], [65, 0]):
        for head_dim in (64, 256):
            shape = Shape(head_dim, kv_heads=2, group=4, page_size=256)
            call = serving(new, [30] * len(new), shape, device, rotary_dim=rotary_dim)
            check(call, evidence, f"{new}, head size {head_dim}")


@pytest.mark.alone
@pytest.mark.parametrize("batch", [16, 64])
def test_A11_prefill_costs_its_work(batch: int, device: torch.device) -> None:
    """Beside the design that guesses the longest sequence from the number of tokens."""
    case = next(case for case in bench_serving.CASES if case.name == f"prefill {batch} x 1024")
    inputs = bench_serving.inputs_of(case, device)
    width = bench_serving.HEADS * bench_serving.HEAD_DIM
    out = torch.empty(case.tokens, width, dtype=torch.float16, device=device)
    emulated = bench_serving.heuristic_call(case, bench_serving.prepare(inputs, out, Family.FLASH_SM80))
    exact, guessed = (
        back_to_back(call, warm_up=3, repeats=10)
        for call in (lambda: torch.ops.pa_ops.paged_attention_(*inputs.tensors, **inputs.options), emulated)
    )
    assert exact <= 0.6 * guessed


MIXES = ([0, 7, 0, 3], [10, 0, 0, 0], [0, 0, 0, 5], [0, 3, 0], [0, 0, 0], [1, 0, 1025, 0, 1])


@pytest.mark.parametrize("rotary_dim", [64, 0])
def test_A5_mixes_with_zero_lengths(rotary_dim: int, device: torch.device, evidence: Evidence) -> None:
    for new in MIXES:
        check(serving(new, range(len(new)), C0, device, rotary_dim=rotary_dim, spare=3), evidence, new)


def test_A6_batches_larger_than_their_tokens(device: torch.device, evidence: Evidence) -> None:
    for idle in (15, 63):
        check(serving([10, *[0] * idle], [0] * (idle + 1), C0, device, rotary_dim=64), evidence, f"10 and {idle} idle")


def test_A8_sequences_without_tokens_are_inert(device: torch.device) -> None:
    call = serving([0, 9, 0], [200, 0, 77], C0, device, rotary_dim=64)
    before = images(call)
    out = serve(call)
    after = images(call)
    own = {page for page, _ in places(call)[1]}
    for old, new in zip(before, after, strict=True):
        for page in range(old.shape[0]):
            assert page in own or torch.equal(old[page], new[page]), f"page {page} changed"
    assert out.shape == (9, 8 * 64)


def test_A12_X5_bounds_change_no_bit(device: torch.device) -> None:
    call = serving([1, 1, 1, 40], [300, 0, 1024, 5], C0, device, rotary_dim=64)
    want = serve(twin(call))
    for bounds in ((40, 1025), (64, 4096), (2**20, 2**20)):
        got = serve(twin({**call, "max_seqlen_q": bounds[0], "max_seqlen_k": bounds[1]}))
        assert torch.equal(got, want), f"bounds {bounds}"
    with pytest.raises(ValueError, match="max_seqlen_q"):
        serve({**call, "max_seqlen_q": -1})


@pytest.mark.alone
def test_A12_decode_makes_two_launches_and_never_waits(device: torch.device, tmp_path: Path) -> None:
    call = serving([1] * 16, [300] * 16, Shape(128, kv_heads=8, group=4), device, packed=True, rotary_dim=128)
    serve(call)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(call)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    events = traced(tmp_path / "trace.json", lambda: serve(call))
    kernels = [e["name"] for e in events if e["cat"] == "kernel"]
    waits = [e["name"] for e in events if e["cat"] == "cuda_runtime" and e["name"].startswith(WAITS)]
    assert len(kernels) == 2 and not waits, (kernels, waits)


def test_A12_X6_graph_replay_of_64_growing_steps(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(64, kv_heads=2, group=4, dtype=dtype)
    starts = [1, 15, 16, 40, 100]
    room = serving([64] * 5, starts, shape, device, rotary_dim=64)
    call = serving([1] * 5, starts, shape, device, packed=True, rotary_dim=64)
    call |= {name: room[name] for name in ("k_cache", "v_cache", "block_table", "cos", "sin", "past_lens")}
    eager = twin(call)
    out = torch.empty(5, shape.heads * 64, dtype=dtype, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        serve(twin(call), out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        serve(call, out=out)
    for step in range(64):
        call["query"].copy_(torch.randn(call["query"].shape, device=device))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, serve(eager)), f"step {step}"
        call["past_lens"] += 1
    for mine, theirs in zip(images(call), images(eager), strict=True):
        assert torch.equal(mine, theirs)


def test_X3_slots_are_authoritative_and_minus_one_stores_nothing(device: torch.device, evidence: Evidence) -> None:
    call = serving([5, 0, 20], [30, 9, 250], C0, device, rotary_dim=64)
    derived = slot_mapping(call)
    assert torch.equal(serve(twin(call)), serve(twin({**call, "slot_mapping": derived})))
    for name in ("k_cache", "v_cache"):
        call[name].nan_to_num_()  # a slot that nothing was stored to is read all the same
    skipped = derived.clone()
    skipped[::2] = -1
    check({**call, "slot_mapping": skipped}, evidence, "every other token stored")
    mine = twin({**call, "slot_mapping": torch.full_like(derived, -1)})
    before = images(mine)
    serve(mine)
    assert all(torch.equal(a, b) for a, b in zip(before, images(mine), strict=True))


@pytest.mark.parametrize("window", [1, 16, 100, 256, 257])
def test_X4_a_window_walks_only_its_pages(window: int, device: torch.device, evidence: Evidence) -> None:
    call = serving([1, 20, 0, 130], [900, 511, 3, 300], C0, device, rotary_dim=64, sliding_window=window)
    whole = serve(twin(call))
    table = call["block_table"].clone()
    pairs = list(zip([1, 20, 0, 130], [900, 511, 3, 300], strict=True))
    for row, (_, past) in enumerate(pairs):
        table[row, : max(0, past - window + 1) // 256] = -1
    pruned = {**call, "block_table": table}
    assert torch.equal(serve(twin(pruned)), whole), "a page behind the window was read"
    check(pruned, evidence, f"window {window}")


def test_sanitizer_sample_of_serving(device: torch.device, evidence: Evidence) -> None:
    for new in ([10, 0, 0, 0], [0, 7, 0, 3], [10, *[0] * 15], [65, 0]):
        for head_dim, rotary_dim in ((64, 64), (40, 16), (128, 0)):
            shape = Shape(head_dim, kv_heads=1, group=3, page_size=7)
            call = serving(new, range(len(new)), shape, device, rotary_dim=rotary_dim, packed=True)
            check(call, evidence, f"{new}, head size {head_dim}")
    wild = serving([3, 4], [5, 6], C0, device, rotary_dim=64)
    wild["cu_seqlens_q"] = torch.tensor([0, 9, 2], dtype=torch.int32, device=device)
    wild["past_lens"] = torch.tensor([-5, 10**9], dtype=torch.int32, device=device)
    serve(wild)
    torch.cuda.synchronize()
