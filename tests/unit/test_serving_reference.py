"""The serving operator's definition, its outputs and every byte of its caches, against loops over single values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pa_ops
from helpers.problems import Shape
from helpers.serving import SMALL, Arguments, angles, image, images, places, serving, slot_mapping, twin
from pa_ops import reference
from pa_ops.reference_serving import locate, rotate, slots_of


def fp32(head_dim: int = 8, kv_heads: int = 2, group: int = 2, page_size: int = 4) -> Shape:
    return Shape(head_dim, kv_heads, group, torch.float32, page_size)


def heads(rows: Tensor, dim: int) -> Tensor:
    return rows.reshape(rows.shape[0], rows.shape[1] // dim, dim)


def split(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, heads, D] of a call, packed or not."""
    dim, hq, hkv = a["k_cache"].shape[3], a["num_heads"], a["num_kv_heads"]
    if a["key"] is not None:
        return heads(a["query"], dim), heads(a["key"], dim), heads(a["value"], dim)
    both = heads(a["query"], dim)
    return both[:, :hq], both[:, hq : hq + hkv], both[:, hq + hkv :]


def turned(x: Tensor, position: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [H, D] of one token, a pair of numbers at a time."""
    half = cos.shape[1]
    out = x.tolist()
    for head, row in enumerate(x.tolist()):
        for i in range(half):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[position, i].item(), sin[position, i].item()
            out[head][one] = row[one] * c - row[two] * s
            out[head][two] = row[two] * c + row[one] * s
    return torch.tensor(out, dtype=torch.float64).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One head's output [D] from its query [D] and the keys and values [n, D] up to its position."""
    first = max(0, len(k) - window) if window > 0 else 0
    scores = [sum((q * key).tolist()) / math.sqrt(len(q)) for key in k[first:]]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(w / sum(weights) * value for w, value in zip(weights, v[first:], strict=True))  # type: ignore[return-value]


def by_loops(a: Arguments, window: int = 0, interleaved: bool = False) -> Tensor:
    """The operator's out; the caches of `a` are updated."""
    q, k, v = split(a)
    out = torch.zeros_like(q)
    group = a["num_heads"] // a["num_kv_heads"]
    size = a["k_cache"].shape[1]
    token = 0
    for sequence, row in enumerate(places(a)):
        for j, (page, offset) in enumerate(row):
            position = int(a["past_lens"][sequence]) + j
            q_row, k_row = q[token], k[token]
            if a["cos"] is not None:
                q_row, k_row = (turned(x, position, a["cos"], a["sin"], interleaved) for x in (q_row, k_row))
            a["k_cache"][page, offset] = k_row
            a["v_cache"][page, offset] = v[token]
            table = a["block_table"][sequence].tolist()
            seen = [(table[p // size], p % size) for p in range(position + 1)]
            for head in range(a["num_heads"]):
                keys, values = (
                    torch.stack([a[name][page, offset, head // group] for page, offset in seen])
                    for name in ("k_cache", "v_cache")
                )
                out[token, head] = attended(q_row[head], keys, values, window)
            token += 1
    return out.flatten(1)


def run(arguments: Arguments, **options: Any) -> Tensor:
    return reference.paged_attention_(**{**arguments, **options})


def assert_caches_equal(a: Arguments, b: Arguments) -> None:
    assert all(map(torch.equal, images(a), images(b)))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=4),
    page=st.sampled_from([1, 3, 4, 16]),
    group=st.sampled_from([1, 3]),
    rotary_dim=st.sampled_from([0, 2, 6, 8]),
    interleaved=st.booleans(),
    packed=st.booleans(),
    window=st.sampled_from([0, 1, 4, 100]),
    seed=st.integers(0, 9),
)
def test_random_batches_match_loops_over_single_values(
    lengths: list[tuple[int, int]],
    page: int,
    group: int,
    rotary_dim: int,
    interleaved: bool,
    packed: bool,
    window: int,
    seed: int,
) -> None:
    new, past = zip(*lengths, strict=True)
    a = serving(new, past, fp32(group=group, page_size=page), packed=packed, rotary_dim=rotary_dim, seed=seed)
    b = twin(a)
    want = by_loops(b, window, interleaved)
    out = run(a, sliding_window=window, rotary_interleaved=interleaved)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a["k_cache"], b["k_cache"], atol=1e-6, rtol=1e-6, equal_nan=True)
    assert torch.equal(image(a["v_cache"]), image(b["v_cache"]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_rotate_turns_pairs_and_copies_the_rest(rotary_dim: int, interleaved: bool) -> None:
    cos, sin = angles(12, rotary_dim)
    x, positions = torch.randn(5, 3, 8), torch.tensor([0, 11, 4, 4, 7])
    got = rotate(x, positions, cos, sin, interleaved)
    want = torch.stack([turned(row, p, cos, sin, interleaved) for row, p in zip(x, positions.tolist(), strict=True)])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:]) and torch.equal(got[0], x[0])
    assert rotate(x[:0], positions[:0], cos, sin, interleaved).shape == (0, 3, 8)


def test_rotate_computes_in_fp32_and_rounds_once() -> None:
    cos, sin = angles(2000, 8)
    x, positions = torch.randn(64, 2, 8).bfloat16(), torch.randint(2000, (64,))
    got = rotate(x, positions, cos, sin, False)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), positions, cos, sin, False).bfloat16())
    halves = cos.bfloat16(), sin.bfloat16()
    want = rotate(x.float(), positions, *(t.float() for t in halves), False).bfloat16()
    assert torch.equal(rotate(x, positions, *halves, False), want)


def test_a_position_past_the_table_takes_its_last_row() -> None:
    cos, sin = angles(5, 8)
    x = torch.randn(3, 1, 8)
    got = rotate(x, torch.tensor([5, 2**40, -1]), cos, sin, False)
    assert torch.equal(got, rotate(x, torch.tensor([4, 4, 0]), cos, sin, False))


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_and_split_tokens_give_the_same_bits(interleaved: bool) -> None:
    kind = {"rotary_dim": 6, "rotary_interleaved": interleaved}
    a, b = (serving([3, 0, 5], [2, 7, 0], packed=packed, **kind) for packed in (False, True))
    assert b["key"] is None and torch.equal(run(a), run(b))
    assert_caches_equal(a, b)


def test_the_steps_are_the_operators_one_by_one() -> None:
    options = {"sliding_window": 4, "softcap": 3.0, "sinks": torch.randn(4), "softmax_scale": 0.4}
    a = serving([3, 0, 5], [2, 7, 1], rotary_dim=8)
    b = twin(a)
    q, k, v = split(b)
    positions = torch.tensor([2, 3, 4, 1, 2, 3, 4, 5])
    q, k = (rotate(x, positions, b["cos"], b["sin"], False) for x in (q, k))
    caches = (b["k_cache"], b["v_cache"])
    reference.append_kv(k, v, *caches, slot_mapping(b))
    lengths = torch.tensor([5, 7, 6], dtype=torch.int32)
    want, want_lse = reference.paged_attention(q, *caches, b["cu_seqlens_q"], lengths, b["block_table"], **options)
    out, lse = torch.empty(8, 32).half(), torch.empty(4, 8)
    torch.ops.pa_ops.paged_attention_.out(**a, **options, out=out, lse=lse)
    assert torch.equal(out, want.flatten(1)) and torch.equal(lse, want_lse)
    assert_caches_equal(a, b)


def test_X3_given_slots_are_the_derived_ones() -> None:
    a = serving([3, 0, 5], [2, 7, 1], rotary_dim=8)
    b = twin(a)
    assert torch.equal(run(a), run(b, slot_mapping=slot_mapping(b)))
    assert_caches_equal(a, b)


@pytest.mark.parametrize("skipped", [-1, -(2**40), 10**9])
def test_X3_a_token_without_a_slot_leaves_bytes_and_attends_all_the_same(skipped: int) -> None:
    a = serving([3, 2], [2, 4])
    for cache in (a["k_cache"], a["v_cache"]):
        cache.nan_to_num_(nan=0.5)
    b, before = twin(a), images(a)
    slots = slot_mapping(a)
    page, offset = divmod(int(slots[1]), 4)
    slots[1] = skipped
    out, whole = run(a, slot_mapping=slots), run(b)
    for now, old, full in zip(images(a), before, images(b), strict=True):
        assert torch.equal(now[page, offset], old[page, offset]) and not torch.equal(
            full[page, offset], old[page, offset]
        )
        full[page, offset] = old[page, offset]
        assert torch.equal(now, full)
    assert torch.equal(out[0], whole[0]) and torch.equal(out[3:], whole[3:])
    assert out[1].isfinite().all() and out[1].any() and not torch.equal(out[1:3], whole[1:3])


def test_A8_sequences_without_tokens_are_inert() -> None:
    busy = serving([3, 2], [5, 0], rotary_dim=8)
    idle = serving([0, 3, 0, 0, 2, 0], [9, 5, 0, 4, 0, 1], rotary_dim=8)
    for name in ("query", "key", "value"):
        idle[name] = busy[name]
    owned = idle["block_table"][[1, 4]]
    for name in ("k_cache", "v_cache"):  # the same cached tokens at the pages that they have here
        for old, new in zip(busy["block_table"].tolist(), owned.tolist(), strict=True):
            for page, place in zip(old, new, strict=False):
                if page >= 0:
                    idle[name][place] = busy[name][page]
    before = images(idle)
    assert torch.equal(run(idle), run(busy))
    others = [page for page in range(idle["k_cache"].shape[0]) if page not in owned.flatten().tolist()]
    assert len(others) >= 4
    for now, old in zip(images(idle), before, strict=True):
        assert torch.equal(now[others], old[others]) and not torch.equal(now, old)


def chunked(whole: Arguments, chunks: list[int]) -> Tensor:
    """One sequence fed in chunks: the rows of all calls, and the caches of `whole` updated."""
    outs, start = [], 0
    for count in chunks:
        part = {name: whole[name][start : start + count] for name in ("query", "key", "value")}
        ends, past = torch.tensor([0, count]).int(), torch.tensor([start]).int()
        outs.append(run({**whole, **part, "cu_seqlens_q": ends, "past_lens": past}))
        start += count
    return torch.cat(outs)


@pytest.mark.parametrize("chunks", [[16, 9, 8], [1] * 33, [32, 1]], ids=len)
@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_D8_chunked_prefill_is_one_shot(chunks: list[int], rotary_dim: int) -> None:
    a = serving([33], [0], rotary_dim=rotary_dim)
    b = twin(a)
    torch.testing.assert_close(chunked(a, chunks), run(b), atol=1e-3, rtol=1e-3)
    assert_caches_equal(a, b)


def test_D7_a_cached_prefix_is_read() -> None:
    a = serving([2], [6])
    b = twin(a)
    page = int(a["block_table"][0, 0])
    b["v_cache"][page, 1] += 1
    out, corrupt = run(a), run(b)
    assert not torch.isclose(out, corrupt, atol=1e-2).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("past", [[], [0], [9, 0, 4]], ids=str)
def test_B23_no_token_on_a_past_touches_nothing(past: list[int], packed: bool) -> None:
    a = serving([0] * len(past), past, packed=packed, rotary_dim=8)
    before = images(a)
    out = pa_ops.paged_attention_(**a, slot_mapping=torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 32) and out.dtype == torch.float16
    assert pa_ops.paged_attention_(**a).shape == (0, 32)
    assert all(map(torch.equal, images(a), before))


@pytest.mark.parametrize("sequences", [1, 257, 300])
def test_B11_B12_any_batch_is_its_sequences(sequences: int) -> None:
    random = torch.Generator().manual_seed(sequences)
    new, past = torch.randint(0, 4, (2, sequences), generator=random).tolist()
    a = serving(new, past, rotary_dim=4)
    b = twin(a)
    out, start = run(a), 0
    for sequence, count in enumerate(new):
        if sequence % 37 and sequence < sequences - 2:
            continue
        start = int(b["cu_seqlens_q"][sequence])
        part = {name: b[name][start : start + count] for name in ("query", "key", "value")}
        one = {"cu_seqlens_q": torch.tensor([0, count]).int()}
        one |= {name: b[name][sequence : sequence + 1] for name in ("past_lens", "block_table")}
        torch.testing.assert_close(run({**b, **part, **one}), out[start : start + count], atol=1e-3, rtol=1e-3)
    stored = [place for row in places(a) for place in row]
    keys = rotate(split(a)[1], locate(a["cu_seqlens_q"], a["past_lens"], sum(new))[1], a["cos"], a["sin"], False)
    for token, (page, offset) in enumerate(stored):
        assert torch.equal(a["k_cache"][page, offset], keys[token])


def test_B14_each_token_finds_its_sequence() -> None:
    ends, past = torch.tensor([0, 0, 5, 5, 9, 9]).int(), torch.tensor([70, 10, 50, 2**31 - 1, 3]).int()
    sequences, positions = locate(ends, past, 12)  # three rows past the end
    assert sequences.tolist() == [1] * 5 + [3] * 4
    assert positions.tolist() == [10, 11, 12, 13, 14, *range(2**31 - 1, 2**31 + 3)]
    for empty in ([0], [0, 0, 0]):
        sequences, positions = locate(torch.tensor(empty).int(), past[: len(empty) - 1], 4)
        assert sequences.shape == positions.shape == (0,)


def test_X2_a_token_of_an_unmapped_page_is_not_stored() -> None:
    table = torch.tensor([[1, -1, 6], [5, 0, 2**31 - 1]], dtype=torch.int32)
    sequences = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 1])
    positions = torch.tensor([3, 4, 8, 12, 1, 6, 8, -1, 2**40])
    assert slots_of(sequences, positions, table, 6, 4).tolist() == [7, -1, -1, -1, 21, 2, -1, -1, -1]
    a = serving([3], [3])
    a["block_table"][0, 1] = -1
    before = images(a)
    run(a)
    for now, old in zip(images(a), before, strict=True):
        changed = (now != old).flatten(2).any(-1).nonzero().tolist()
        assert changed == [[int(a["block_table"][0, 0]), 3]]


def test_B28_the_caches_change_in_place_and_in_the_new_slots_alone() -> None:
    a = serving([3, 0, 5], [2, 7, 1])
    addresses = a["k_cache"].data_ptr(), a["v_cache"].data_ptr()
    before = images(a)
    out = pa_ops.paged_attention_(**a)
    assert (a["k_cache"].data_ptr(), a["v_cache"].data_ptr()) == addresses and out.data_ptr() not in addresses
    for now, old, new in zip(images(a), before, split(a)[1:], strict=True):
        for token, place in enumerate(p for row in places(a) for p in row):
            old[place] = image(new[token])
        assert torch.equal(now, old)


def test_rows_past_the_last_token_are_neither_stored_nor_attended() -> None:
    a = serving([3, 2], [2, 4], rotary_dim=8, spare=3)
    b = {**twin(a), **{name: a[name][:5] for name in ("query", "key", "value")}}
    out, lse = torch.full((8, 32), 7.0).half(), torch.full((4, 8), 7.0)
    slots = torch.cat((slot_mapping(a), torch.tensor([0, 1, 2])))
    torch.ops.pa_ops.paged_attention_.out(**a, slot_mapping=slots, out=out, lse=lse)
    assert torch.equal(out[:5], run(b)) and (out[5:] == 7).all() and (lse[:, 5:] == 7).all()
    assert_caches_equal(a, b)
    assert not run(a)[5:].any()


@pytest.mark.parametrize("pool", ["fused", "hnd", "packed"])
def test_X9_D10_caches_are_used_by_view(pool: str) -> None:
    views, plain = (serving([3, 2], [2, 4], Shape(8, 2, 2, page_size=4, pool=p)) for p in (pool, "separate"))
    assert torch.equal(pa_ops.paged_attention_(**views), pa_ops.paged_attention_(**plain))
    assert_caches_equal(views, plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_X10_a_quantised_cache_holds_the_rounded_key_over_the_scale(dtype: torch.dtype, per_head: bool) -> None:
    a = serving([3, 2], [0, 0], rotary_dim=8)
    for name in ("k_cache", "v_cache"):
        a[name] = torch.zeros(a[name].shape).to(dtype)
    k_scale, v_scale = (torch.tensor(s)[: 2 if per_head else 1] for s in ([0.04, 0.02], [0.03, 0.05]))
    out = pa_ops.paged_attention_(**a, k_scale=k_scale, v_scale=v_scale)
    _, k, v = split(a)
    k = rotate(k, torch.tensor([0, 1, 2, 0, 1]), a["cos"], a["sin"], False)
    at = slot_mapping(a)
    for name, new, scale in (("k_cache", k, k_scale), ("v_cache", v, v_scale)):
        stored = a[name][at // 4, at % 4]
        assert torch.equal(image(stored), image(reference.quantise(new, dtype, scale)))
    plain = twin(serving([3, 2], [0, 0], rotary_dim=8))
    torch.testing.assert_close(out, pa_ops.paged_attention_(**plain), atol=0.5, rtol=0.2)


def test_E9_no_window_and_a_wide_one_are_the_same() -> None:
    a = serving([3, 2], [2, 4], rotary_dim=8)
    want = run(twin(a))
    for window in (0, -1, 6, 2**31 - 1):
        assert torch.equal(run(twin(a), sliding_window=window), want)


def test_X5_bounds_change_nothing() -> None:
    a = serving([3, 0, 2], [2, 9, 4], rotary_dim=8)
    want = run(twin(a))
    for bound in (0, 3, 2**20):
        assert torch.equal(run(twin(a), max_seqlen_q=bound, max_seqlen_k=bound), want)


def test_lying_prefix_sums_stay_inside_the_tensors() -> None:
    for lie in ([0, 2, 9], [0, -4, 3], [4, 1, 3], [0, 9, 1], [-7, -7, -7]):
        a = serving([2, 3], [3, 4], SMALL, rotary_dim=8)
        for cache in (a["k_cache"], a["v_cache"]):
            cache.nan_to_num_()
        out = run(a, cu_seqlens_q=torch.tensor(lie).int())
        assert out.shape == (5, 32) and out.isfinite().all()
