"""The reference append_kv and merge_states, and what a quantised cache means, against loops over single values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_ops import reference

INF = float("inf")
NAN = float("nan")
QUANTISED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


@settings(max_examples=30, deadline=None)
@given(page=st.sampled_from([1, 3, 4, 16]), tokens=st.integers(0, 9), seed=st.integers(0, 99))
def test_append_writes_each_slot_and_nothing_else(page: int, tokens: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    k_cache, v_cache = torch.randn(2, 12, page, 2, 8, generator=random).half()
    before = k_cache.clone(), v_cache.clone()
    slots = torch.randperm(12 * page, generator=random)[:tokens]
    slots = torch.where(torch.rand(len(slots), generator=random) < 0.3, -1, slots)
    packed = torch.randn(len(slots) + 1, 6, 8, generator=random).half()  # a slice of packed QKV, one row too many
    reference.append_kv(packed[:, 2:4], packed[:, 4:], k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before[0][slot // page, slot % page] = packed[token, 2:4]
            before[1][slot // page, slot % page] = packed[token, 4:]
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


@settings(max_examples=30, deadline=None)
@given(page=st.sampled_from([1, 3, 16]), lengths=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 99))
def test_B13_gather_copies_each_token_and_nothing_else(page: int, lengths: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    k_cache, v_cache = (torch.randn(9, page, 2, dim, generator=random).half() for dim in (8, 24))
    table = torch.randint(-2, 12, (len(lengths), 3), generator=random, dtype=torch.int32)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    k, v = (torch.full((int(ends[-1]) + 2, 2, dim), NAN).half() for dim in (8, 24))
    reference.gather_kv(k_cache, v_cache, table, ends, k, v)
    for sequence, length in enumerate(lengths):
        for position in range(length):
            row, place = int(ends[sequence]) + position, position // page
            number = int(table[sequence, place]) if place < 3 else -1
            for rows, cache in ((k, k_cache), (v, v_cache)):
                mapped = 0 <= number < 9
                want = cache[number, position % page] if mapped else torch.zeros_like(rows[row])
                assert torch.equal(rows[row], want)
    assert k[ends[-1] :].isnan().all() and v[ends[-1] :].isnan().all(), "rows past the last stay as they are"


def test_gather_undoes_append() -> None:
    k, v = torch.randn(2, 11, 2, 8).half()
    caches = torch.zeros(2, 6, 4, 2, 8).half()
    table, ends = torch.tensor([[4, 1], [5, 0]], dtype=torch.int32), torch.tensor([0, 7, 11], dtype=torch.int32)
    slots = torch.tensor([16, 17, 18, 19, 4, 5, 6, 20, 21, 22, 23])
    reference.append_kv(k, v, *caches, slots)
    back = torch.zeros(2, 11, 2, 8).half()
    reference.gather_kv(*caches, table, ends, *back)
    assert torch.equal(back[0], k) and torch.equal(back[1], v)


def test_X3_a_negative_slot_is_not_stored() -> None:
    k_cache, v_cache = torch.zeros(2, 4, 4, 1, 8)
    new = torch.ones(3, 1, 8)
    reference.append_kv(new, new * 2, k_cache, v_cache, torch.tensor([-1, 5, -1]))
    assert k_cache.sum() == 8 and v_cache.sum() == 16 and (k_cache[1, 1] == 1).all() and (v_cache[1, 1] == 2).all()


def test_a_slot_past_the_cache_is_not_stored() -> None:
    k_cache, v_cache = torch.zeros(2, 2, 2, 1, 8)
    new = torch.ones(2, 1, 8)
    reference.append_kv(new, new, k_cache, v_cache, torch.tensor([4, 2**40]))
    assert not k_cache.any() and not v_cache.any()


def test_X9_append_through_fused_and_hnd_views() -> None:
    new = torch.randn(3, 2, 8)
    slots = torch.tensor([7, 0, 4])
    plain_k, plain_v = torch.zeros(2, 3, 4, 2, 8)
    reference.append_kv(new, -new, plain_k, plain_v, slots)
    fused = torch.zeros(3, 2, 4, 2, 8)
    reference.append_kv(new, -new, fused[:, 0], fused[:, 1], slots)
    hnd = torch.zeros(2, 3, 2, 4, 8)
    reference.append_kv(new, -new, hnd[0].transpose(1, 2), hnd[1].transpose(1, 2), slots)
    assert torch.equal(fused[:, 0], plain_k) and torch.equal(fused[:, 1], plain_v)
    assert torch.equal(hnd[0].transpose(1, 2), plain_k) and torch.equal(hnd[1].transpose(1, 2), plain_v)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantise_rounds_to_the_nearest_representable_value(dtype: torch.dtype) -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    table = torch.sort(bytes_[torch.isfinite(bytes_)]).values
    values = torch.cat([torch.randn(200) * 3, torch.randn(50) * 1e3, table, torch.tensor([INF, -INF, 1e30, -1e30])])
    stored = reference.quantise(values.reshape(-1, 1, 1), dtype, None).float().flatten()
    reachable = values.double().clamp(table.min().item(), table.max().item())
    nearest = (reachable[:, None] - table.double()).abs().min(1).values
    assert torch.equal((stored.double() - reachable).abs(), nearest)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_append_and_attend_agree_on_the_scales(dtype: torch.dtype, per_head: bool) -> None:
    k_scale, v_scale = torch.tensor([0.05, 0.02]), torch.tensor([0.03, 0.04])
    if not per_head:
        k_scale, v_scale = k_scale[:1], v_scale[:1]
    key, value = torch.randn(2, 6, 2, 8).clamp(-2.5, 2.5)  # int8 saturates at 127 * 0.02 = 2.54
    k_cache, v_cache = torch.zeros(2, 2, 4, 2, 8).to(dtype)
    slots = torch.tensor([0, 1, 2, 3, 4, 5])
    reference.append_kv(key, value, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    q = torch.randn(2, 4, 8)
    cu, length, table = torch.tensor([0, 2]), torch.tensor([6]), torch.tensor([[0, 1]])
    out, lse = reference.paged_attention(q, k_cache, v_cache, cu, length, table, k_scale=k_scale, v_scale=v_scale)
    k = k_cache.float() * k_scale.reshape(-1, 1)
    v = v_cache.float() * v_scale.reshape(-1, 1)
    want, want_lse = reference.paged_attention(q, k, v, cu, length, table)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    step = 0.5 * 0.05 if dtype == torch.int8 else 0.05 * 16  # half a quantisation step at the largest value
    assert (k[:2].flatten(0, 1)[:6] - key).abs().max() <= step


def test_nan_stays_nan_in_fp8_and_becomes_zero_in_int8() -> None:
    bad = torch.full((1, 1, 8), NAN)
    assert torch.isnan(reference.quantise(bad, torch.float8_e4m3fn, None).float()).all()
    assert not reference.quantise(bad, torch.int8, None).any()


def half_states(length: int, cut: int) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(3, 4, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    cu = torch.tensor([0, 3])

    def attend(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.tensor([0, len(k[part])])
        return reference.varlen_attention(q, k[part], v[part], cu, ends, causal=False)

    return *attend(slice(0, cut)), *attend(slice(cut, None)), *attend(slice(None))


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_X8_two_halves_merged_are_the_whole(cut: int) -> None:
    out_a, lse_a, out_b, lse_b, out, lse = half_states(9, cut)
    merged, merged_lse = reference.merge_states(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)


@pytest.mark.parametrize("empty", [INF, -INF])
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_X8_an_infinite_side_is_empty_whatever_it_holds(empty: float, garbage: float) -> None:
    out_a, lse_a, *_ = half_states(4, 4)
    out_b, lse_b = torch.full_like(out_a, garbage), torch.full_like(lse_a, empty)
    for merged, lse in (
        reference.merge_states(out_a, lse_a, out_b, lse_b),
        reference.merge_states(out_b, lse_b, out_a, lse_a),
    ):
        assert torch.equal(merged, out_a) and torch.equal(lse, lse_a)
    merged, lse = reference.merge_states(out_b, lse_b, out_b, -lse_b)
    assert not merged.any() and (lse == -INF).all()
