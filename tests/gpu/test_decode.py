"""The decode family on the GPU: any window, group and split, from poisoned workspaces, to equal bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.parity import Evidence, check, error_of, repeats
from helpers.problems import Call, Shape, paged
from helpers.rooms import as_it_began, poison
from pa_ops import reference
from pa_ops.spec import InstanceSpec

pytestmark = pytest.mark.gpu

SEQUENCES = (1, 8, 16)
HEADS = ((8, 1), (16, 4), (32, 4))
HEAD_DIMS = (64, 128)
PAGES = (16, 32)
LENGTHS = (  # context, window
    (9216, 8192),
    (4097, 2048),
    (2048, 512),
    (2048, 1024),
    (768, 512),
    (513, 512),
    (512, 512),
    (4096, 1024),
    (300, 128),
    (100, 0),
    (1, 1),
)
PREFIX = "pa_attn_decode_"


def uniform(
    sequences: int, ctx: int, window: int, heads: tuple[int, int], head_dim: int, page: int, dtype: torch.dtype
) -> Call:
    """One query token of each sequence; pages behind the window are unmapped."""
    device = torch.device("cuda", torch.cuda.current_device())
    columns = -(-ctx // page)
    table = torch.randperm(sequences * columns, device=device).to(torch.int32).view(sequences, columns)
    if window:
        table[:, : max(0, ctx - window) // page] = -1
    pool = torch.randn(2, sequences * columns, page, heads[1], head_dim, device=device).to(dtype)
    tensors = {
        "q": torch.randn(sequences, heads[0], head_dim, device=device).to(dtype),
        "k_cache": pool[0],
        "v_cache": pool[1],
        "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32, device=device),
        "seqlens_k": torch.full((sequences,), ctx, dtype=torch.int32, device=device),
        "block_table": table,
    }
    return Call("paged_attention", tensors, sequences, {"sliding_window": window})


def on_decode(call: Call, evidence: Evidence, what: object) -> Tensor:
    """Checks a call that the decode family must serve alone."""
    out, _ = check(call.with_options(backend="decode"), evidence, what)
    last = pa_ops.trace.last()
    assert last is not None and last.instance.startswith(PREFIX)
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page", PAGES)
def test_E6_E7_windows_lengths_heads(page: int, head_dim: int, dtype: torch.dtype, evidence: Evidence) -> None:
    for sequences, heads, (ctx, window) in product(SEQUENCES, HEADS, LENGTHS):
        call = uniform(sequences, ctx, window, heads, head_dim, page, dtype)
        on_decode(call, evidence, f"{sequences} x {ctx}, window {window}, heads {heads}, page {page}")


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 999, 1000, 1001])
def test_E1_keys_admitted(window: int, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    shape = Shape(128, kv_heads=2, group=4, dtype=dtype)
    on_decode(paged([(1, 1000), (1, 3), (2, 700)], shape, device, sliding_window=window), evidence, f"window {window}")


@pytest.mark.parametrize(
    ("ctx", "window", "states"),
    [(9216, 8192, 16), (4097, 2048, 5), (2048, 512, 0), (2048, 1024, 2), (768, 512, 1), (513, 512, 1), (512, 512, 0)],
)
def test_E2_E3_keys_behind_the_window_are_in_no_share(ctx: int, window: int, states: int, device: torch.device) -> None:
    """A chunk of 512 keys leaves a state, or adds to its share's first: as many are left as there are live chunks.

    A row of one chunk leaves none, and one of less than two shares' tiles the sum of its chunks.
    """
    head_dim, rows = 64, 16
    call = uniform(1, ctx, window, (8, 1), head_dim, 16, torch.float16)
    room = poison(device)
    with pa_ops.batch_invariant():
        call.run(backend="decode")
    last = pa_ops.trace.last()
    assert last is not None
    tile = InstanceSpec.parse(last.instance).tile.n
    live = -(-ctx // tile) - (ctx - window) // tile
    assert live * tile <= window + 2 * tile
    a_state = rows * (head_dim + 2)
    whole = room[: room.numel() // a_state * a_state].view(-1, a_state)
    assert int((~whole[:, rows * head_dim].isnan()).sum()) == states


def test_shares_of_hundreds_of_tiles(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    """Of sequences of all lengths, 287 a block of an H200, to equal bits each time."""
    pairs = [(1 + row % 3, 6000 + (977 * row) % 7000) for row in range(64)]
    call = paged(pairs, Shape(64, kv_heads=16, group=2, dtype=dtype), device)
    first = on_decode(call, evidence, "long shares").clone()
    poison(device)
    for _ in range(5):
        again, _ = call.run(backend="decode")
        assert torch.equal(again[: call.rows], first[: call.rows])
        assert as_it_began(device)


def test_a_nan_is_posted_like_a_number(dtype: torch.dtype, device: torch.device) -> None:
    """Also one of ones alone, which is what a word that nobody has posted yet looks like: no block waits for ever."""
    call = paged([(1, 4096)] * 2, Shape(128, kv_heads=2, group=4, dtype=dtype), device)
    for cache in ("k_cache", "v_cache"):
        call.tensors[cache].view(torch.int16).fill_(-1)
    out, _ = call.run(backend="decode")
    torch.cuda.synchronize(device)
    assert out[: call.rows].isnan().all() and as_it_began(device)


def test_E11_a_narrow_window_at_the_end_of_a_long_context(device: torch.device, evidence: Evidence) -> None:
    on_decode(uniform(8, 131072, 128, (32, 8), 128, 16, torch.bfloat16), evidence, "131072 keys, window 128")


def test_E4_a_workspace_of_nan_does_not_show(device: torch.device, evidence: Evidence) -> None:
    poison(device)
    on_decode(paged([(1, 5000), (1, 3), (1, 900)], Shape(64), device), evidence, "NaN workspace")
    assert as_it_began(device)


def test_E8_a_window_beyond_the_context_is_none(device: torch.device) -> None:
    call = paged([(1, 1024)] * 4, Shape(128, kv_heads=4, dtype=torch.bfloat16), device)
    whole, _ = call.run(backend="decode")
    wide, _ = call.with_options(sliding_window=1124).run(backend="decode")
    assert torch.allclose(whole[:4].float(), wide[:4].float(), atol=1e-3, rtol=1e-3)


def test_E9_no_window_is_no_window(device: torch.device) -> None:
    call = paged([(1, 300), (2, 17)], Shape(64), device)
    plain = call.run(backend="decode")
    for window in (0, -1):
        again = call.with_options(sliding_window=window).run(backend="decode")
        assert torch.equal(again[0][: call.rows], plain[0][: call.rows])


@pytest.mark.parametrize("group", [1, 4, 5, 8, 16, 32])
def test_E10_several_tokens_and_every_group(
    group: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(64, kv_heads=2, group=group, dtype=dtype)
    for new, window, causal in product((1, 2, 3, 4, 17), (0, 40), (True, False)):
        pairs = [(new, 200), (0, 30), (new, 2), (1, 65), (new, 0)]
        on_decode(paged(pairs, shape, device, sliding_window=window, causal=causal), evidence, (new, window, causal))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 136, 192, 256])
def test_options_at_every_head_size(
    head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype, page_size=7)
    sinks = torch.linspace(-2, 6, shape.heads, device=device)
    for softcap, extra, window in product((0.0, 20.0), (None, sinks), (0, 50)):
        pairs = [(1, 2000), (3, 64), (1, 0), (0, 9), (1, 65), (2, 129)]
        call = paged(pairs, shape, device, softcap=softcap, sinks=extra, sliding_window=window)
        on_decode(call, evidence, f"softcap {softcap}, sinks {extra is not None}, window {window}")


def test_every_number_of_tiles_and_sequences(device: torch.device, evidence: Evidence) -> None:
    for sequences in (1, 2, 3, 31, 33, 129, 300):
        pairs = [(1, 1 + (97 * row * row) % 1500) for row in range(sequences)]
        on_decode(paged(pairs, Shape(64, kv_heads=1, group=2), device), evidence, f"{sequences} sequences")


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    call = paged([(1, 4000), (1, 77), (2, 9000), (1, 1)], Shape(128, kv_heads=4, group=8), device)
    repeats(partial(call.run, backend="decode"), call.rows)


def milliseconds(work: Callable[[], object]) -> float:
    """The time of one call on the GPU, the least of several."""
    work()
    best = float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


@pytest.mark.alone
def test_E13_time_follows_live_work() -> None:
    call = uniform(8, 65536, 0, (32, 8), 128, 16, torch.bfloat16)
    whole = milliseconds(call.run)
    part = milliseconds(call.with_options(sliding_window=1024).run)
    assert part <= 0.25 * whole, f"{part} ms of {whole} ms"


def test_long_context_on_a_few_sequences() -> None:
    call = uniform(2, 131072, 0, (8, 1), 128, 64, torch.float16)
    out, _ = call.run()
    want, _ = reference.paged_attention(*call.tensors.values())
    error_of(out, want, out.dtype, "131072 keys")
