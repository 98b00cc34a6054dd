"""The reference attention operators against torch's own attention, one sequence and one explicit mask at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pa_ops import reference

INF = float("inf")
NAN = float("nan")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def prefix_sums(lengths: list[int]) -> Tensor:
    return int32(0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist())


def mask_of(new: int, length: int, causal: bool, window: int) -> Tensor:
    """Which of `length` keys each of `new` queries sees, spelled out from the definition."""
    rows = []
    for query in range(new):
        position = length - new + query
        row = [True] * length
        if causal or window > 0:
            row = [key <= position for key in range(length)]
        if window > 0:
            row = [seen and key > position - window for key, seen in enumerate(row)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(new, length)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """torch's attention of q [n, Hq, D] over k, v [m, Hkv, D]; rows that see nothing are zeros."""
    group = q.shape[1] // k.shape[1]
    expanded = [t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v)]
    out = scaled_dot_product_attention(q.transpose(0, 1), *expanded, attn_mask=mask, scale=scale).transpose(0, 1)
    return torch.where(mask.any(1)[:, None, None], out, 0.0)


def log_sum_exp(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The natural log-sum of visible scores, [Hq, n], by a loop over heads."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~mask, -INF)
        heads.append(torch.logsumexp(scores, -1) if mask.shape[1] else torch.full((q.shape[0],), -INF))
    return torch.stack(heads)


@dataclass
class Batch:
    """Contiguous K and V per sequence, and the same tokens scattered over a shuffled page pool."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor

    @property
    def paged(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.cu_seqlens_q, self.seqlens_k, self.block_table

    @property
    def varlen(self) -> tuple[Tensor, ...]:
        lengths = prefix_sums([len(k) for k in self.keys])
        return self.q, torch.cat(self.keys), torch.cat(self.values), self.cu_seqlens_q, lengths


def make_batch(
    new: list[int], lengths: list[int], *, page: int = 4, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0
) -> Batch:
    """Random fp32 tensors; pages that no sequence owns, and slots past a length, hold NaN."""
    random = torch.Generator().manual_seed(seed)
    keys = [torch.randn(n, kv_heads, dim, generator=random) for n in lengths]
    values = [torch.randn(n, kv_heads, dim, generator=random) for n in lengths]
    width = max(-(-n // page) for n in lengths) + 1
    pool = torch.randperm(width * len(lengths) + 2, generator=random).int()
    k_cache = torch.full((len(pool), page, kv_heads, dim), NAN)
    v_cache = torch.full((len(pool), page, kv_heads, dim), NAN)
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        count = -(-length // page)
        table[sequence, :count] = pool[sequence * width : sequence * width + count]
        for token in range(length):
            k_cache[table[sequence, token // page], token % page] = keys[sequence][token]
            v_cache[table[sequence, token // page], token % page] = values[sequence][token]
    q = torch.randn(sum(new), heads, dim, generator=random)
    return Batch(q, keys, values, prefix_sums(new), int32(*lengths), k_cache, v_cache, table)


def expected(batch: Batch, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for sequence, (k, v) in enumerate(zip(batch.keys, batch.values, strict=True)):
        start, stop = batch.cu_seqlens_q[sequence : sequence + 2].tolist()
        q = batch.q[start:stop]
        mask = mask_of(len(q), len(k), causal, window)
        outs.append(sdpa(q, k, v, mask))
        sums.append(log_sum_exp(q, k, mask))
    return torch.cat(outs), torch.cat(sums, 1)


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 19)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    page=st.sampled_from([1, 2, 3, 4, 7, 16]),
    group=st.sampled_from([1, 2, 5]),
    causal=st.booleans(),
    window=st.sampled_from([-1, 0, 1, 2, 5, 19, 100]),
    seed=st.integers(0, 9),
)
def test_random_batches_match_torch(
    lengths: list[tuple[int, int]], page: int, group: int, causal: bool, window: int, seed: int
) -> None:
    new, visible = [n for n, _ in lengths], [k for _, k in lengths]
    batch = make_batch(new, visible, page=page, heads=2 * group, kv_heads=2, seed=seed)
    want, want_lse = expected(batch, causal, window)
    for out, lse in (
        reference.paged_attention(*batch.paged, causal=causal, sliding_window=window),
        reference.varlen_attention(*batch.varlen, causal=causal, sliding_window=window),
    ):
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_rows_without_a_visible_key_are_exact_zeros() -> None:
    batch = make_batch([5, 3, 2], [2, 0, 4])  # the first three rows of sequence 0 stand at negative positions
    out, lse = reference.paged_attention(*batch.paged)
    blind = [0, 1, 2, 5, 6, 7]
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    assert torch.equal(lse[:, blind], torch.full_like(lse[:, blind], -INF))
    assert torch.isfinite(lse[:, [3, 4, 8, 9]]).all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_masked_values_never_leak(poison: float) -> None:
    batch = make_batch([3], [6])
    want, want_lse = reference.varlen_attention(*batch.varlen)
    batch.keys[0][5] = poison
    batch.values[0][5] = poison  # visible to the last row, masked for the two rows before it
    out, lse = reference.varlen_attention(*batch.varlen)
    torch.testing.assert_close(out[:2], want[:2])
    torch.testing.assert_close(lse[:, :2], want_lse[:, :2])
    assert not torch.isfinite(out[2]).all()


def test_a_visible_infinity_in_v_reaches_the_rows_that_see_it() -> None:
    batch = make_batch([3], [6])
    batch.values[0][4, :, 0] = INF
    out, _ = reference.varlen_attention(*batch.varlen)
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[:, :, 1:]).all()
    assert (out[1:, :, 0] == INF).all()


@pytest.mark.parametrize("window", [0, 3])
def test_X2_poisoned_pools_and_unmapped_pages_are_masked(window: int) -> None:
    batch = make_batch([2, 2], [7, 5], page=2)  # every slot outside the live range holds NaN already
    batch.block_table[0, -1] = 10**6
    out, lse = reference.paged_attention(*batch.paged, sliding_window=window)
    want, want_lse = expected(batch, True, window)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    for unmapped in (-1, -7, len(batch.k_cache), 2**31 - 1):
        batch.block_table[0, 1] = unmapped  # tokens 2 and 3 of sequence 0 are gone
        out, _ = reference.paged_attention(*batch.paged, sliding_window=window)
        mask = mask_of(2, 7, True, window)
        mask[:, 2:4] = False
        torch.testing.assert_close(out[:2], sdpa(batch.q[:2], batch.keys[0], batch.values[0], mask))
        torch.testing.assert_close(out[2:], want[2:])


def test_page_zero_is_an_ordinary_page_and_an_empty_pool_masks_everything() -> None:
    batch = make_batch([1], [2], page=2)
    pages = torch.zeros(1, 2, 2, 8)
    pages[0] = batch.keys[0]
    out, _ = reference.paged_attention(batch.q, pages, pages, int32(0, 1), int32(2), torch.zeros(1, 1).int())
    torch.testing.assert_close(out, sdpa(batch.q, pages[0], pages[0], mask_of(1, 2, True, 0)))
    out, lse = reference.paged_attention(batch.q, pages[:0], pages[:0], int32(0, 1), int32(2), torch.zeros(1, 1).int())
    assert not out.any() and (lse == -INF).all()


def test_softcap_comes_before_the_mask() -> None:
    batch = make_batch([2], [4])
    batch.values[0].fill_(0.2)
    batch.values[0][3] = 1000.0
    batch.q *= 50
    out, _ = reference.varlen_attention(*batch.varlen, softcap=1.0)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 0.2))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_scale_softcap_order(softcap: float) -> None:
    batch = make_batch([3], [5], heads=2, kv_heads=2)
    out, lse = reference.varlen_attention(*batch.varlen, softmax_scale=0.7, softcap=softcap)
    for head in range(2):
        scores = softcap * torch.tanh(0.7 * batch.q[:, head] @ batch.keys[0][:, head].T / softcap)
        scores = scores.masked_fill(~mask_of(3, 5, True, 0), -INF)
        torch.testing.assert_close(out[:, head], torch.softmax(scores, -1) @ batch.values[0][:, head])
        torch.testing.assert_close(lse[head], torch.logsumexp(scores, -1))


def test_a_sink_joins_the_denominator_only() -> None:
    batch = make_batch([2, 1], [4, 0])
    sinks = torch.tensor([-2.0, 0.0, 3.0, 6.0])
    plain, plain_lse = reference.paged_attention(*batch.paged)
    out, lse = reference.paged_attention(*batch.paged, sinks=sinks)
    share = torch.sigmoid(plain_lse[:, :2] - sinks[:, None]).T[..., None]
    torch.testing.assert_close(out[:2], plain[:2] * share)
    torch.testing.assert_close(lse[:, :2], torch.logaddexp(plain_lse[:, :2], sinks[:, None]))
    assert not out[2].any() and torch.equal(lse[:, 2], sinks)  # no visible key: zeros, and the sink's own value


def test_a_window_is_causal_whatever_causal_says() -> None:
    batch = make_batch([4], [9])
    banded = reference.paged_attention(*batch.paged, sliding_window=3, causal=True)
    assert all(map(torch.equal, banded, reference.paged_attention(*batch.paged, sliding_window=3, causal=False)))


def test_the_out_buffers_keep_rows_past_the_last_sequence() -> None:
    batch = make_batch([2, 1], [3, 4])
    want, want_lse = reference.paged_attention(*batch.paged)
    padded = torch.cat([batch.q, torch.full((2, 4, 8), NAN)])
    out, lse = torch.full((5, 4, 8), 7.0), torch.full((4, 5), 7.0)
    reference.paged_attention(padded, *batch.paged[1:], out=out, lse=lse)
    assert torch.equal(out[:3], want) and torch.equal(lse[:, :3], want_lse)
    assert (out[3:] == 7).all() and (lse[:, 3:] == 7).all()
    out, lse = reference.paged_attention(padded, *batch.paged[1:])
    assert not out[3:].any() and (lse[:, 3:] == -INF).all()


def test_X5_bounds_change_nothing() -> None:
    batch = make_batch([2, 3], [7, 5])
    want = reference.paged_attention(*batch.paged)
    for bound in (0, 3, 2**20):
        got = reference.paged_attention(*batch.paged, max_seqlen_q=bound, max_seqlen_k=bound)
        assert all(map(torch.equal, want, got))


def test_D10_X9_fused_hnd_and_packed_caches_are_read_by_view() -> None:
    batch = make_batch([3, 1], [9, 6])
    want = reference.paged_attention(*batch.paged)
    pages, page, kv_heads, dim = batch.k_cache.shape
    fused = torch.stack([batch.k_cache, batch.v_cache], 1)  # [pages, 2, page, Hkv, D]
    hnd = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (batch.k_cache, batch.v_cache)]
    packed = torch.cat([batch.k_cache, batch.v_cache], -1).transpose(1, 2).contiguous()  # [pages, Hkv, page, 2D]
    views = [(fused[:, 0], fused[:, 1]), tuple(hnd)]
    views.append((packed[..., :dim].transpose(1, 2), packed[..., dim:].transpose(1, 2)))
    for k_cache, v_cache in views:
        assert k_cache.shape == (pages, page, kv_heads, dim) and not k_cache.is_contiguous()
        got = reference.paged_attention(batch.q, k_cache, v_cache, *batch.paged[3:])
        assert all(map(torch.equal, want, got))


def test_row_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([11, 5], [17, 5])
    want, want_lse = expected(batch, True, 6)
    monkeypatch.setattr("pa_ops.reference_rows.SCORES_PER_CHUNK", 4 * 17 * 3)
    out, lse = reference.paged_attention(*batch.paged, sliding_window=6)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_fp32(dtype: torch.dtype) -> None:
    batch = make_batch([3], [8])
    half = [t.to(dtype) for t in batch.varlen[:3]]
    out, lse = reference.varlen_attention(*half, *batch.varlen[3:])
    want, want_lse = reference.varlen_attention(*(t.float() for t in half), *batch.varlen[3:])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, want.to(dtype)) and torch.equal(lse, want_lse)


def test_lying_prefix_sums_stay_inside_the_tensors() -> None:
    batch = make_batch([2, 1], [3, 4])
    for lie in ([0, 2, 9], [0, -4, 3], [5, 1, 3]):
        out, lse = reference.paged_attention(*batch.paged[:3], int32(*lie), *batch.paged[4:])
        assert out.shape == batch.q.shape and not torch.isnan(out).any() and not torch.isnan(lse).any()
    out, _ = reference.paged_attention(*batch.paged[:4], int32(3, 10**6), batch.block_table)
    assert math.isfinite(out[:2].sum())


def test_scores_of_distant_magnitude_stay_finite() -> None:
    batch = make_batch([1], [4], heads=2, kv_heads=2)
    out, lse = reference.varlen_attention(batch.q * 1e4, *batch.varlen[1:])
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
